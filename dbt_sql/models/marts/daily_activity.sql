{{ config(meta={'grain': 'sum', 'key': ['activity_date', 'event_type']}) }}

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
        coalesce(sum({{ exact_amount('amount') }}), 0) as amount
    from events
    group by activity_date, event_type

)

select * from final
