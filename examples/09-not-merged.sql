-- Which mappings are not even looked at, and why?
-- Pages by mapping and reason, most first; docs/ksm.md says what each reason means. not_marked are the ones to gain:
-- `ksmdist run --eligible all` says what marking them would save. Candidates, which KSM does look at, are left out.
select i.image_id, coalesce(r.region, '-') as region, r.reason, r.pages
from (
    unpivot regions on columns(* exclude (image, region)) into name reason value pages
) r
join images i on i.scan_order = r.image
where r.reason <> 'candidates' and r.pages > 0
order by r.pages desc, i.image_id, region, r.reason
limit 20
