{#- Sources without the name of the database, as `ref` does it. -#}
{% macro source() %}
  {%- do return(builtins.source(*varargs, **kwargs).include(database=false)) -%}
{% endmacro %}

{#- The sources, when dbt runs alone: all arrivals at once, of each the load that counts. The
    pipeline itself makes them for the users that it is at work on. -#}
{% macro create_sources() %}
create schema if not exists pipeline;
create or replace table pipeline.loads as
select arrival, load_id from read_json(
  {{ quote_text(var('loads_glob')) }},
  columns = {arrival: 'VARCHAR', load_id: 'VARCHAR'}, hive_partitioning = false
);
create or replace view pipeline.canonical_events as
select * from read_parquet(
  {{ quote_text(var('events_glob')) }}, hive_partitioning = true, hive_types_autocast = false
) where (arrival, load) in (select (arrival, load_id) from pipeline.loads);
create or replace table pipeline.event_versions as
select * from read_parquet({{ quote_text(var('versions_glob')) }}, hive_partitioning = false)
where (arrival, load_id) in (select (arrival, load_id) from pipeline.loads);
create or replace table pipeline.night_cutoffs as
{% for cutoff in var('observation_cutoffs') -%}
select
  {{ timestamp_constant(cutoff) }} as observation_cutoff,
  {{ timestamp_constant(cutoff) }} = {{ timestamp_constant(var('train_cutoff')) }} as is_train_cutoff
{% if not loop.last -%} union {%- endif %}
{% endfor %};
{% endmacro %}
