"""The report's page. Filled in by `page.py`; every value is escaped."""

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd; }
p { margin: .5rem 0; max-width: 50rem; }
.lead { font-size: 1.1rem; }
.note, figcaption { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee;
  vertical-align: top; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .88em; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0 0 0 1.2rem; }
summary { cursor: pointer; }
.option { white-space: nowrap; }
</style>
</head>
<body>
{%- macro table(header, rows) %}
<table>
<thead><tr>{% for name in header %}<th{% if name.startswith('#') %} class="number"{% endif %}>\
{{ name.lstrip('#') }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>{% for cell in row %}<td{% if header[loop.index0].startswith('#') %} \
class="number"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table>
{%- endmacro %}
{%- macro words(text) %}
{%- for word in text.split(' ') %}{% if word.startswith('--') %}<span class="option">{{ word }}\
</span>{% else %}{{ word }}{% endif %} {% endfor %}
{%- endmacro %}
{%- macro plot(figure) %}
<figure><img src="{{ figure.image }}" alt="{{ figure.caption }}">
<figcaption>{{ figure.caption }}</figcaption></figure>
{%- endmacro %}
<h1>{{ title }}</h1>
{% for paragraph in lead %}<p class="lead">{{ paragraph }}</p>
{% endfor %}
<h2 id="next">What to try next</h2>
{% if advice %}<dl>
{% for item in advice %}<dt>{{ item.subject }}</dt>\
<dd>{{ words(item.finding) }}{{ words(item.remedy) }}</dd>
{% endfor %}</dl>
{% else %}<p>No layer, block or setting stands out.</p>
{% endif %}
<h2 id="error">Error</h2>
<p>{{ meaning }}</p>
{{ plot(depth) }}
{{ plot(kinds) }}
{{ table(kind_header, kind_rows) }}
<p>The layers with the largest error; all of them are in <code>report.parquet</code>:</p>
{{ table(worst_header, worst_rows) }}
{% for reason, names in skipped %}<p>Left dense ({{ reason }}): {{ names }}.</p>{% endfor %}
<h2 id="mask">The mask</h2>
{% if mask %}<p>{{ mask_words }}</p>
{{ plot(mask) }}
{% if input_rows %}<p>Columns of the weights: the inputs that the mask favours or drops in many \
rows at once. Never kept: by no row, so that the layer no longer sees this input. Rarely and \
often: by less than half and by more than one and a half times the mean share of the rows. With \
their norm: the correlation of how often an input is kept and the logarithm of its norm on the \
calibration text, in the median layer. Near +1 the mask follows the size of the inputs, near 0 it \
does not.</p>
{{ table(input_header, input_rows) }}{% endif %}
{% else %}<p>Not counted: at least one block was made by a version of prox24 that did not.</p>
{% endif %}
<h2 id="time">Time and memory</h2>
<p>{{ time_words }}</p>
{% if times %}{{ plot(times) }}
{% else %}<p>Not kept by phase: the job was run by a version of prox24 that did not.</p>
{% endif %}
{{ table(work_header, work_rows) }}
<h2 id="workers">Workers</h2>
{% if timeline %}{{ plot(timeline) }}
{% else %}<p>When each was at work was not kept: the job was run by a version of prox24 that did \
not.</p>
{% endif %}
{% if many_workers %}<details><summary>{{ worker_rows | length }} workers</summary>{% endif %}
{{ table(worker_header, worker_rows) }}
{% if many_workers %}</details>{% endif %}
<h2 id="retries">Retries</h2>
{% if failures %}{{ table(failure_header, failures) }}
<p>The work that was lost was done again from what was committed; the result is the same.</p>
{% else %}<p>None: nothing failed on the way, as far as the run directory tells.</p>
{% endif %}
<h2 id="settings">Settings</h2>
{{ table(['setting', 'value'], settings) }}
<h2 id="environment">Environment</h2>
{{ table(['what', 'value'], environment) }}
<h2 id="hashes">Hashes</h2>
<p>SHA-256 of what went in and what came out. <code>prox24 verify OUTPUT --source MODEL</code> \
checks the output against them.</p>
<details><summary>{{ hashes | length }} hashes</summary>
{{ table(['what', 'SHA-256'], hashes) }}
</details>
<p class="note">Made by prox24 {{ version }} from {{ run_directory }}; \
<code>prox24 report RUN_DIR</code> makes it again.</p>
</body>
</html>
"""
