{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

target_days as (

    select * from {{ ref('int_user_target_days') }}

),

value_counts as (

    select
        target_days.target,
        cast(sum(target_days.num_events) as bigint) as num_events
    from target_days
    inner join cutoffs
        on
            target_days.activity_date >= cutoffs.lookback_start_date
            and target_days.activity_date < cutoffs.cutoff_date
    where cutoffs.is_train_cutoff
    group by target_days.target

),

final as (

    select
        cast(row_number() over (order by num_events desc, target asc) as integer) as target_rank,
        target,
        num_events
    from value_counts
    qualify target_rank <= {{ var('num_targets') | int }}

)

select * from final
