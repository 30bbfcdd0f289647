"""The paper's figures and tables, measured with this library: `imaml-ext reproduce NAME`.

The `measure` of each module yields one record per curve, point or cell; its `draw` needs only these
records.
"""

from imaml_ext.experiments.reproduce.fig2a import STUDY as FIG2A
from imaml_ext.experiments.reproduce.fig2b import STUDY as FIG2B
from imaml_ext.experiments.reproduce.sinusoid import STUDY as SINUSOID
from imaml_ext.experiments.reproduce.study import Study
from imaml_ext.experiments.reproduce.table1 import STUDY as TABLE1
from imaml_ext.experiments.reproduce.tables import NATURAL, TABLE2, TABLE3

STUDIES = {
    "fig2a": FIG2A,
    "table1": TABLE1,
    "fig2b": FIG2B,
    "sinusoid": SINUSOID,
    "table2": TABLE2,
    "table3": TABLE3,
    "natural": NATURAL,
}

__all__ = ["STUDIES", "Study"]
