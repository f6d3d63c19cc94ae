{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

user_rfm as (

    select * from {{ ref('user_rfm') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

label_windows as (

    select
        cutoffs.observation_cutoff,
        user_days.user_id,
        sum(user_days.num_qualifying_events) as num_qualifying_events,
        sum(user_days.qualifying_amount) as amount,
        arg_min(user_days.first_event_type, user_days.activity_date) as next_event_type
    from user_days
    inner join cutoffs
        on
            user_days.activity_date >= cutoffs.cutoff_date
            and user_days.activity_date < cutoffs.horizon_end_date
    group by cutoffs.observation_cutoff, user_days.user_id

),

population as (

    select
        user_rfm.observation_cutoff,
        user_rfm.user_id
    from user_rfm
    inner join cutoffs on user_rfm.observation_cutoff = cutoffs.observation_cutoff
    where user_rfm.is_in_population and cutoffs.is_label_complete

),

final as (

    select
        population.observation_cutoff,
        population.user_id,
        coalesce(label_windows.num_qualifying_events, 0) = 0 as is_churned,
        cast(coalesce(label_windows.num_qualifying_events, 0) as bigint) as num_qualifying_events,
        cast(coalesce(label_windows.amount, 0) as double) as amount,
        label_windows.next_event_type
    from population
    left join label_windows
        on
            population.observation_cutoff = label_windows.observation_cutoff
            and population.user_id = label_windows.user_id

)

select * from final
