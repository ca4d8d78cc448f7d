"""CrysXPP, CGCNN with a selector of element features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from crysdistill.encoders.cgcnn import CGCNN
from crysdistill.layers.elements import ElementEmbedding
from crysdistill.structures.elements import CGCNN_BLOCKS


class FeatureSelector(ElementEmbedding):
    """W (mask * features) + b, with a learned factor for each feature.

    Args:
        features: the number of features in the element table.
        width: F.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__(features, width)
        self.mask = nn.Parameter(torch.ones(features))

    def forward(self, features: Tensor) -> Tensor:
        """Embed element vectors (elements, features) as (elements, F)."""
        return super().forward(features * self.mask)


class CrysXPP(CGCNN):
    """The property predictor of CrysXPP.

    A CGCNN that first multiplies element features by learned factors. A trained factor
    (`feature_weights`) only hints at the importance of its feature, since the weights
    behind it can compensate. The convolutions usually start from CrysXPP's autoencoder,
    a CGCNN without the embedding's bias, trained to reconstruct connectivity and
    element features.

    Source: K. Das et al., npj Comput. Mater. 8, 43 (2022),
    doi:10.1038/s41524-022-00716-8. Convolutions: see `CGCNN`.

    Differs from the paper:

    - The L1 penalty that makes the factors sparse is not part of the encoder. The
      published training loop lacks it, too.

    Args:
        width: F, of the atom and crystal embeddings.
        convolutions: the number of convolutions.
        convolution: `published`, `eq5` or `eq4`; see `CGCNN`.
        elements: the element table, a name in `crysdistill.structures.elements`.
        cutoff: Å, where the Gaussians end; the graph's cutoff.
        spacing: Å, between Gaussians.

    Raises:
        InputError: a setting is out of range.
    """

    name: ClassVar[str] = "crysxpp"
    embedding: FeatureSelector
    HEAD: ClassVar[Mapping[str, Any]] = {
        "hidden": 128,
        "layers": 1,
        "activation": "softplus",
        "first": True,
    }
    SMALL: ClassVar[Mapping[str, Any]] = {"width": 8, "convolutions": 2}

    def __init__(
        self,
        width: int = 64,
        convolutions: int = 3,
        convolution: Literal["published", "eq5", "eq4"] = "published",
        elements: str = "cgcnn92",
        cutoff: float = 8.0,
        spacing: float = 0.2,
    ) -> None:
        super().__init__(width, convolutions, convolution, elements, cutoff, spacing)
        for key in ("bias", "normalize", "token"):
            del self.settings[key]
        self.embedding = FeatureSelector(self.element_table.shape[1], width)

    @classmethod
    def for_properties(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Change nothing; atoms are averaged without normalising."""
        return dict(settings)

    def feature_weights(self) -> dict[str, Tensor]:
        """Return the learned factors of element features, by the property they encode.

        Returns:
            For each block of the element table, such as `electronegativity`, the
            factors of its bins. A factor starts at 1.
        """
        mask = self.embedding.mask.detach()
        if self.settings["elements"] != "cgcnn92":
            return {self.settings["elements"]: mask}
        parts = mask.split(list(CGCNN_BLOCKS.values()))
        return dict(zip(CGCNN_BLOCKS, parts, strict=True))
