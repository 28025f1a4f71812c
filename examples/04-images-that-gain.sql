-- Which images gain most?
-- Pages of each image that are merged, with each other or with other images, and what KSM itself would say of the
-- process (ksm_process_profit, bytes; null where it does not). unreadable: pages that are not counted at all.
select i.image_id, i.tenant, i.total as pages,
       s.ksm_merging_pages + coalesce(s.ksm_zero_pages, 0) as merged_pages,
       round(100 * merged_pages / nullif(i.total, 0), 1) as percent,
       i.shared_with_others,
       s.ksm_process_profit,
       i.unreadable
from images i
join ksm_stat s on s.image = i.scan_order
order by merged_pages desc, i.image_id
limit 20
