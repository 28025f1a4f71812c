-- How varied is the rest, zero pages left out?
-- Contents by how many copies they have. Many contents with few copies: the saving is spread thin, and more memory
-- brings more of it. Few contents with many copies: a handful of pages, which 02-most-merged.sql names.
select copies as from_copies,
       2 * copies - 1 as to_copies,
       sum(contents) as contents,
       sum(pages) as pages,
       round(100 * sum(pages) / sum(sum(pages)) over (), 1) as percent_of_pages
from spectrum_buckets
where kind <> 'zero'
group by copies
order by copies
