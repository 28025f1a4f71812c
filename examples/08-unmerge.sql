-- What would unmerging everything need?
-- Frames that echo 2 > /sys/kernel/mm/ksm/run would take, for this run's settings, for each way to account for zero
-- pages: if the host does not have them free, it swaps or kills. zero_pages_given_back: of them, zero pages.
select w.accounting, w.present, w.unmerge_frames,
       w.unmerge_frames * (select any_value(page_size) from counters) as bytes_needed,
       w.zero_pages_given_back
from whatif w
join whatif now on now.present
where w.max_page_sharing is not distinct from now.max_page_sharing
  and w.merge_across_nodes = now.merge_across_nodes
order by w.present desc, w.accounting
