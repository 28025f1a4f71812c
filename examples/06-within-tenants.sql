-- What does it cost to merge within tenants only, or within images only?
-- Each policy, what it saves, and what is lost against merging everything.
select policy, saved_bytes, saved_gib,
       max(saved_bytes) filter (policy = 'all') over () - saved_bytes as lost_bytes,
       round(100 * saved_bytes / nullif(max(saved_bytes) filter (policy = 'all') over (), 0), 1) as percent_of_all
from policy
order by level
