{{ config(materialized='table', meta={'grain': 'arrivals'}) }}

with

versions as (

    -- Each load that met the id has listed it, not all of them at the same time.
    select
        event_id,
        arrival,
        state,
        min(ingested_at) as ingested_at,
        case when arrival = 'history' then '' else arrival end as arrival_rank
    from {{ source('pipeline', 'event_versions') }}
    group by event_id, arrival, state

),

ranked as (

    select
        *,
        row_number() over (partition by event_id order by arrival_rank desc) = 1 as is_newest,
        count(*) over (partition by event_id) > 1 or state = 0 as is_contested,
        min(ingested_at) over (partition by event_id, state) as first_ingested_at
    from versions

),

final as (

    select
        event_id,
        arrival,
        is_newest and state <> 0 as is_counted,
        first_ingested_at
    from ranked
    -- An id that other arrivals held once, but no longer do, is an event like others.
    where is_contested

)

select * from final
