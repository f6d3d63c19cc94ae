{{ config(meta={'grain': 'user', 'stored_as': 'parquet'}) }}

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
        user_bucket,
        event_number,
        gap_seconds,
        session_started_at
    from session_starts

)

select * from final
