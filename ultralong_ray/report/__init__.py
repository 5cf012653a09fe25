"""The report room: files of finished stages in; report.html, report.json, report.md and recipe.toml out.

    reading -> evaluation, facts -> figures -> page

`facts` and `evaluation` turn stage files into one JSON-ready dict, which is report.json; `figures` draws from that dict
alone and `page` lays it out, so a number on the page that report.json does not hold cannot exist.
"""
