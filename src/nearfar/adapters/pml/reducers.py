"""`pytorch_metric_learning.reducers`: their classes, which the losses here read.

The mean, the sum, `AvgNonZeroReducer` and `ThresholdReducer` are taken inside the loss. So are
`ClassWeightedReducer` and `PerAnchorReducer` over all pairs of a batch, in memory linear in it.
Any other reducer, a subclass of these too, is given the losses themselves; those of pairs or
triplets are then listed, and take memory.

>>> import torch
>>> from nearfar.adapters.pml import losses, reducers
>>> x, labels = torch.eye(3), torch.tensor([0, 0, 1])
>>> losses.NTXentLoss(temperature=1.0, reducer=reducers.SumReducer())(x, labels)
tensor(1.3863)
"""

from nearfar.extras import needs

with needs("pml"):
    from pytorch_metric_learning.reducers import (
        AvgNonZeroReducer,
        BaseReducer,
        ClassWeightedReducer,
        DivisorReducer,
        DoNothingReducer,
        MeanReducer,
        MultipleReducers,
        PerAnchorReducer,
        SumReducer,
        ThresholdReducer,
    )

__all__ = [
    "AvgNonZeroReducer",
    "BaseReducer",
    "ClassWeightedReducer",
    "DivisorReducer",
    "DoNothingReducer",
    "MeanReducer",
    "MultipleReducers",
    "PerAnchorReducer",
    "SumReducer",
    "ThresholdReducer",
]
