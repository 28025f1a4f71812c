-- How much of what is merged is the zero page?
-- One row for each kind of page: what merging saves, and its share of all that is saved. If zero pages have nearly all
-- of it, use_zero_pages and a guest that keeps its free pages zero do most of what KSM can do here.
with kinds as (
    select unnest(['zero', 'same_filled', 'other']) as kind,
           unnest([saved_zero, saved_same_filled, saved_other]) as pages
    from policy
    where policy = 'all'
)
select kind,
       pages as saved_pages,
       pages * (select any_value(page_size) from counters) / 1048576 as saved_mib,
       round(100 * pages / nullif(sum(pages) over (), 0), 1) as percent
from kinds
order by saved_pages desc, kind
