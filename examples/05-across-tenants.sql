-- Who shares with whom across tenants?
-- Pairs of images of different tenants, by the pages they hold in common, zero pages left out. Each is a place where
-- one tenant can see, by how long a write takes, that another has a page. A content of three images is in three rows:
-- do not add them up. Images with no tenant are one tenant, with an empty name.
select a.tenant, b.tenant as other_tenant, s.image_id, s.other_id, s.contents, s.pages, s.other_pages
from sharing s
join images a on a.scan_order = s.image
join images b on b.scan_order = s.other
where a.tenant <> b.tenant
order by s.pages + s.other_pages desc, s.image, s.other
limit 20
