with

source as (

    select * from {{ source('pipeline', 'canonical_events') }}

),

final as (

    select
        cast(event_id as varchar) as event_id,
        cast(user_id as varchar) as user_id,
        cast(event_type as varchar) as event_type,
        cast(occurred_at as timestamp with time zone) as occurred_at,
        cast(ingested_at as timestamp with time zone) as ingested_at,
        cast(item_id as varchar) as item_id,
        cast(category as varchar) as category,
        cast(location as varchar) as location,
        cast(context as varchar) as context,
        cast(amount as double) as amount,
        cast(codes as smallint[]) as codes
    from source

)

select * from final
