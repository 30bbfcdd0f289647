"""The paper's analysis, measured with this library: `imaml-ext reproduce NAME`.

Each module measures (`measure`, which yields one record a curve or a point) and draws (`draw`, from
records alone).
"""

from imaml_ext.reproduce import fig2a, fig2b, sinusoid, table1
from imaml_ext.reproduce.study import Study

STUDIES: dict[str, Study] = {
    "fig2a": fig2a.STUDY,
    "table1": table1.STUDY,
    "fig2b": fig2b.STUDY,
    "sinusoid": sinusoid.STUDY,
}

__all__ = ["STUDIES", "Study"]
