"""A training program for pytorch-metric-learning; a test runs it again with one line changed."""

import numpy as np
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, samplers, trainers

np.random.seed(0)
torch.manual_seed(0)
centres = torch.randn(10, 12)
labels = torch.arange(10).repeat_interleave(16)
items = centres[labels] + torch.randn(len(labels), 12)
dataset = torch.utils.data.TensorDataset(items, labels)

models = {
    "trunk": torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.ReLU()),
    "embedder": torch.nn.Linear(32, 6),
}
metric_loss = losses.MultipleLosses(
    [
        losses.TripletMarginLoss(
            margin=0.2,
            distance=distances.CosineSimilarity(),
            reducer=reducers.ThresholdReducer(low=0),
        ),
        losses.ArcFaceLoss(10, 6, margin=15, scale=16),
        losses.MultiSimilarityLoss(),
    ],
    weights=[1.0, 0.5, 0.5],
)
miner = miners.MultiSimilarityMiner(epsilon=0.1)
optimizers = {
    "trunk_optimizer": torch.optim.SGD(models["trunk"].parameters(), lr=0.1),
    "embedder_optimizer": torch.optim.SGD(models["embedder"].parameters(), lr=0.1),
    "metric_loss_optimizer": torch.optim.SGD(metric_loss.parameters(), lr=0.1),
}


def show(trainer):
    if trainer.iteration % 4 == 3:
        print(f"{trainer.losses['metric_loss']:.4f}")


trainers.MetricLossOnly(
    models,
    optimizers,
    batch_size=40,
    loss_funcs={"metric_loss": metric_loss},
    mining_funcs={"tuple_miner": miner},
    dataset=dataset,
    sampler=samplers.MPerClassSampler(labels, m=4, length_before_new_iter=len(dataset)),
    dataloader_num_workers=0,
    data_device="cpu",
    end_of_iteration_hook=show,
).train(num_epochs=3)

memory = losses.CrossBatchMemory(
    losses.NTXentLoss(temperature=0.1), embedding_size=6, memory_size=120, miner=miner
)
network = torch.nn.Linear(12, 6)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
for step in range(12):
    chosen = torch.randint(0, len(items), (40,))
    value = memory(network(items[chosen]), labels[chosen])
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    if step % 4 == 3:
        print(f"{value.item():.4f}")
