"""The paper's figures and tables, measured with this library: `imaml-ext reproduce NAME`.

The `measure` of each module yields one record per curve, point or cell; its `draw` needs only these
records.
"""

from imaml_ext.experiments.reproduce import fig2a, fig2b, sinusoid, table1, tables

STUDIES = {
    "fig2a": fig2a.STUDY,
    "table1": table1.STUDY,
    "fig2b": fig2b.STUDY,
    "sinusoid": sinusoid.STUDY,
    **tables.STUDIES,
}
