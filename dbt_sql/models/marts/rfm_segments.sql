{{ config(materialized='view') }}

with

user_rfm as (

    select * from {{ ref('user_rfm') }}

),

-- Users with equal values get equal scores, which NTILE would not give them.
ranked as (

    select
        *,
        percent_rank() over (
            partition by observation_cutoff order by recency_days desc
        ) as recency_rank,
        percent_rank() over (
            partition by observation_cutoff order by frequency
        ) as frequency_rank,
        percent_rank() over (
            partition by observation_cutoff order by monetary
        ) as monetary_rank
    from user_rfm
    where is_in_population

),

scored as (

    select
        *,
        cast(1 + least(4, floor(5 * recency_rank)) as integer) as recency_score,
        cast(1 + least(4, floor(5 * frequency_rank)) as integer) as frequency_score,
        cast(1 + least(4, floor(5 * monetary_rank)) as integer) as monetary_score
    from ranked

),

final as (

    select
        observation_cutoff,
        user_id,
        recency_days,
        frequency,
        monetary,
        recency_score,
        frequency_score,
        monetary_score,
        case
            when recency_score >= 4 and frequency_score + monetary_score >= 8 then 'champions'
            when recency_score >= 3 and frequency_score + monetary_score >= 6 then 'loyal'
            when recency_score >= 4 then 'new or promising'
            when recency_score = 3 then 'needs attention'
            when recency_score = 1 and frequency_score + monetary_score >= 8 then 'cannot lose'
            when frequency_score + monetary_score >= 6 then 'at risk'
            else 'hibernating'
        end as rfm_segment
    from scored

)

select * from final
