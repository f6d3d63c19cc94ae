{{ config(meta={'grain': 'user'}) }}

with

events as (

    select * from {{ ref('events_sessionized') }}

),

sessions as (

    select
        user_id,
        session_started_at,
        max(occurred_at) as ended_at,
        count(*) as num_events,
        count(*) filter (where {{ is_qualifying('event_type') }}) as num_qualifying_events,
        cast(list_unique(list(item_id)) as bigint) as num_items,
        cast(list_unique(list(event_type)) as bigint) as num_event_types,
        {{ sum_of_amounts('amount') }} as amount,
        arg_min(event_type, event_number) as first_event_type,
        arg_max(event_type, event_number) as last_event_type,
        min(event_number) as first_event_number
    from events
    group by user_id, session_started_at

),

final as (

    select
        user_id,
        session_started_at,
        num_events,
        num_qualifying_events,
        num_items,
        num_event_types,
        amount,
        {{ seconds_between('session_started_at', 'ended_at') }} as duration_seconds,
        first_event_type,
        last_event_type,
        first_event_number = 1 as is_first_session,
        num_events = 1 as is_bounce,
        ended_at
    from sessions

)

select * from final
