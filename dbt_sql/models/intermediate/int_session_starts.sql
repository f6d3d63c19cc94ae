with

event_gaps as (

    select * from {{ ref('int_event_gaps') }}

),

marked as (

    select
        *,
        coalesce(gap_seconds > {{ var('session_gap_seconds') | int }}, true) as is_session_start
    from event_gaps

),

final as (

    select
        *,
        max(case when is_session_start then occurred_at end) over (
            partition by user_id
            order by event_number
            rows between unbounded preceding and current row
        ) as session_started_at
    from marked

)

select * from final
