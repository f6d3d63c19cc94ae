with

events as (

    select * from {{ ref('stg_events') }}

),

final as (

    select
        *,
        row_number() over history as event_number,
        {{ seconds_between('lag(occurred_at) over history', 'occurred_at') }} as gap_seconds
    from events
    window history as (partition by user_id order by occurred_at, event_id)

)

select * from final
