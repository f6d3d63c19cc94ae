{#- The only way in which a variable becomes a text constant. -#}
{% macro quote_text(value) -%}
  '{{ value | string | replace("'", "''") }}'
{%- endmacro %}

{% macro quote_texts(values) -%}
  {%- for value in values -%}{{ quote_text(value) }}{{ ", " if not loop.last }}{%- endfor -%}
{%- endmacro %}
