-- Which contents are merged most, and what are they?
-- Most copies first. `what` is a guess for all but zero and fill_word; the first place is where to look for more.
select rank, copies, images, tenants, what, meaning,
       first_image || ' ' || coalesce(region, format('{:#x}', first_address)) as first_place
from contents
order by rank
limit 20
