{{ config(materialized='view') }}

with

events as (

    select * from {{ ref('events_sessionized') }}

),

session_events as (

    select
        user_id,
        session_started_at,
        event_type,
        count(*) as num_events,
        min(event_number) as first_number,
        max(event_number) filter (where {{ is_qualifying('event_type') }}) as last_qualifying_number
    from events
    group by user_id, session_started_at, event_type

),

with_outcome as (

    select
        *,
        max(last_qualifying_number) over (
            partition by user_id, session_started_at
        ) as last_outcome_number
    from session_events

),

final as (

    select
        user_id,
        session_started_at,
        event_type,
        num_events,
        row_number() over (
            partition by user_id, session_started_at order by first_number
        ) as step_number,
        coalesce(last_outcome_number >= first_number, false) as is_converted
    from with_outcome

)

select * from final
