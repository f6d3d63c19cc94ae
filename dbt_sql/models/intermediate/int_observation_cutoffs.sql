{{ config(materialized='table', meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ source('pipeline', 'night_cutoffs') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

span as (

    select max(last_event_at) as last_event_at from user_days

),

dated as (

    select
        *,
        {{ utc_date('observation_cutoff') }} as cutoff_date,
        max(observation_cutoff) over () as night_cutoff
    from cutoffs

),

final as (

    select
        dated.observation_cutoff,
        dated.cutoff_date,
        dated.cutoff_date - {{ var('lookback_days') | int }} as lookback_start_date,
        dated.cutoff_date + {{ var('horizon_days') | int }} as horizon_end_date,
        dated.is_train_cutoff,
        dated.observation_cutoff = dated.night_cutoff as is_night_cutoff,
        coalesce(
            cast(dated.cutoff_date + {{ var('horizon_days') | int }} as timestamp)
            <= {{ utc_timestamp('span.last_event_at') }},
            false
        )
        -- A night knows what came before its own cutoff, also when nothing has come after it yet.
        or dated.cutoff_date + {{ var('horizon_days') | int }}
        <= {{ utc_date('dated.night_cutoff') }} as is_label_complete
    from dated
    cross join span

)

select * from final
