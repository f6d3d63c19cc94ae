with

source as (

    select * from {{ source('pipeline', 'canonical_events') }}

),

versions as (

    select * from {{ ref('int_event_versions') }}

),

counted as (

    select
        source.*,
        coalesce(versions.first_ingested_at, source.ingested_at) as first_ingested_at
    from source
    left join versions
        on
            source.event_id = versions.event_id
            and source.arrival = versions.arrival
    where coalesce(versions.is_counted, true)

),

final as (

    select
        cast(event_id as varchar) as event_id,
        cast(user_id as varchar) as user_id,
        cast(event_type as varchar) as event_type,
        cast(occurred_at as timestamp with time zone) as occurred_at,
        cast(first_ingested_at as timestamp with time zone) as ingested_at,
        cast(item_id as varchar) as item_id,
        cast(category as varchar) as category,
        cast(location as varchar) as location,
        cast(context as varchar) as context,
        cast(amount as double) as amount,
        cast(codes as smallint[]) as codes,
        cast(user_bucket as integer) as user_bucket
    from counted

)

select * from final
