{{ config(meta={'grain': 'days'}) }}

with

events as (

    select * from {{ ref('events_sessionized') }}

),

final as (

    select
        {{ utc_date('occurred_at') }} as activity_date,
        event_type,
        count(*) as num_events,
        count(distinct user_id) as num_users,
        {{ sum_of_amounts('amount') }} as amount
    from events
    group by activity_date, event_type

)

select * from final
