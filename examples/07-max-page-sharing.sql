-- Which max_page_sharing is best?
-- Profit (bytes saved, less the rmap items) for each value, all other settings as they are; null is unlimited. Where
-- the rows hardly differ, leave it alone: a high value makes unmapping and migrating a page slow.
select w.max_page_sharing, w.pages_shared, w.pages_sharing, w.stable_node_dups, w.profit,
       w.profit - now.profit as more_than_now, w.present
from whatif w
join whatif now on now.present
where w.accounting = now.accounting and w.merge_across_nodes = now.merge_across_nodes
order by w.profit desc, w.max_page_sharing desc nulls last
