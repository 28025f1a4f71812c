-- What would breaking huge pages cost?
-- Aligned frames of the size of a huge page, by how many of their pages are zero or have a copy elsewhere, which may
-- merge. KSM splits a huge page for the first page of it that merges: huge_frames in the rows with few such pages are
-- lost for little. zero_frames can be given back whole.
select mergeable as from_mergeable_pages,
       sum(frames) as frames,
       sum(huge_frames) as huge_frames,
       sum(zero_frames) as zero_frames,
       sum(mergeable_pages) as mergeable_pages,
       round(sum(mergeable_pages) / nullif(sum(frames), 0), 1) as pages_a_frame
from huge
group by mergeable
order by mergeable
