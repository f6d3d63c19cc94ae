{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

qualifying_history as (

    select
        cutoffs.observation_cutoff,
        cutoffs.lookback_start_date,
        user_days.user_id,
        count(*) as frequency,
        cast(sum(user_days.qualifying_amount) as double) as monetary,
        max(user_days.last_qualifying_at) as last_qualifying_at
    from user_days
    inner join cutoffs on user_days.activity_date < cutoffs.cutoff_date
    where user_days.num_qualifying_events > 0
    group by cutoffs.observation_cutoff, cutoffs.lookback_start_date, user_days.user_id

),

final as (

    select
        observation_cutoff,
        user_id,
        {{ hours_between('last_qualifying_at', 'observation_cutoff') }} / 24.0 as recency_days,
        frequency,
        monetary,
        last_qualifying_at,
        {{ utc_date('last_qualifying_at') }} >= lookback_start_date as is_in_population
    from qualifying_history

)

select * from final
