with

events as (

    select * from {{ ref('stg_events') }}

),

-- An event that arrived twice has rows side by side in this order: they share a number, and the
-- first to arrive is kept.
numbered as (

    select
        *,
        dense_rank() over (
            partition by user_id order by occurred_at, event_id
        ) as event_number,
        lag(event_id) over history as previous_event_id,
        lag(occurred_at) over history as previous_occurred_at
    from events
    window history as (partition by user_id order by occurred_at, event_id, ingested_at)

),

final as (

    select
        event_id,
        user_id,
        event_type,
        occurred_at,
        ingested_at,
        item_id,
        category,
        location,
        context,
        amount,
        codes,
        event_number,
        {{ seconds_between('previous_occurred_at', 'occurred_at') }} as gap_seconds
    from numbered
    where
        previous_event_id is distinct from event_id
        or previous_occurred_at is distinct from occurred_at

)

select * from final
