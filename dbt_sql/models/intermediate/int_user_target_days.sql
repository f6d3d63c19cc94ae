{{ config(materialized='table', meta={'grain': 'user'}) }}

with

events as (

    select * from {{ ref('events_sessionized') }}

),

final as (

    select
        user_id,
        {{ utc_date('occurred_at') }} as activity_date,
        {{ propensity_column() }} as target,
        count(*) as num_events
    from events
    where
        {{ is_propensity_event('event_type') }}
        and {{ propensity_column() }} is not null
    group by user_id, activity_date, {{ propensity_column() }}

)

select * from final
