with

session_starts as (

    select * from {{ ref('int_session_starts') }}

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
        gap_seconds,
        session_started_at,
        {{ user_bucket('user_id', var('num_buckets')) }} as user_bucket
    from session_starts

)

select * from final
