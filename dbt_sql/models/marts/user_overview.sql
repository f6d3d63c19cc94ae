{{ config(materialized='view') }}

with

user_aggregates as (

    select * from {{ ref('user_aggregates') }}

),

user_rfm as (

    select * from {{ ref('user_rfm') }}

),

rfm_segments as (

    select * from {{ ref('rfm_segments') }}

),

latest as (

    select max(observation_cutoff) as observation_cutoff from user_aggregates

),

final as (

    select
        user_aggregates.user_id,
        user_aggregates.observation_cutoff,
        rfm_segments.rfm_segment,
        coalesce(user_rfm.is_in_population, false) as is_in_population,
        user_rfm.recency_days as qualifying_recency_days,
        user_rfm.frequency,
        user_rfm.monetary,
        user_aggregates.recency_days,
        user_aggregates.tenure_days,
        user_aggregates.num_events,
        user_aggregates.num_events_30d,
        user_aggregates.num_sessions,
        user_aggregates.num_sessions_30d,
        user_aggregates.num_active_days,
        user_aggregates.amount,
        user_aggregates.amount_30d,
        user_rfm.last_qualifying_at
    from user_aggregates
    inner join latest on user_aggregates.observation_cutoff = latest.observation_cutoff
    left join user_rfm
        on
            user_aggregates.observation_cutoff = user_rfm.observation_cutoff
            and user_aggregates.user_id = user_rfm.user_id
    left join rfm_segments
        on
            user_aggregates.observation_cutoff = rfm_segments.observation_cutoff
            and user_aggregates.user_id = rfm_segments.user_id

)

select * from final
