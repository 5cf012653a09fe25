"""The reproduction's results: folders of finished runs in; one JSON, its figures as SVG files and its tables out.

    runs, trials -> gather -> jobs/results/reproduction.json -> figures, tables

Figures and tables read the JSON alone, so that they can be made again where the runs are not.
"""
