{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

target_days as (

    select * from {{ ref('int_user_target_days') }}

),

labels as (

    select * from {{ ref('labels') }}

),

targets as (

    select * from {{ ref('propensity_targets') }}

),

taken as (

    select distinct
        cutoffs.observation_cutoff,
        target_days.target,
        target_days.user_id
    from target_days
    inner join cutoffs
        on
            target_days.activity_date >= cutoffs.cutoff_date
            and target_days.activity_date < cutoffs.horizon_end_date
    where cutoffs.is_label_complete

),

final as (

    select
        taken.observation_cutoff,
        taken.target,
        taken.user_id
    from taken
    inner join targets on taken.target = targets.target
    inner join labels
        on
            taken.observation_cutoff = labels.observation_cutoff
            and taken.user_id = labels.user_id

)

select * from final
