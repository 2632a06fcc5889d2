"""Train a sparse image classifier with SGD: p-norm decay around another optimizer than Adam, without the Trainer.

    python examples/sgd_vision.py --target_sparsity 0.9

The images are the 1797 handwritten digits of 8 × 8 pixels in scikit-learn; 360 of them are test images.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_pdecay import LpDecay, SparsityControl, build_param_groups, decayed_parameter_names, measure_sparsity


def main() -> None:
    """Train, and print the accuracy and the fraction of zeros."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_sparsity", type=float, default=0.9, help="fraction of zeros (0.9), 0 for no target")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate (0.05)")
    parser.add_argument("--steps", type=int, default=600, help="steps of 64 images (600)")
    options = parser.parse_args()
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        parser.error("the images need scikit-learn: pip install scikit-learn, or the extra 'hf-pdecay[examples]'.")
    torch.manual_seed(0)

    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    groups = build_param_groups(model, p_norm=0.8, lambda_p=0.001)
    optimizer = LpDecay(torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    control = SparsityControl(optimizer, options.steps, target_sparsity=options.target_sparsity)
    for step in range(1, options.steps + 1):
        control.before_step(step)
        batch = torch.randint(360, len(labels), (64,))
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        control.after_step(step)

    with torch.no_grad():
        accuracy = (model(images[:360]).argmax(1) == labels[:360]).float().mean().item()
    report = measure_sparsity(model, decayed=decayed_parameter_names(model, optimizer.param_groups))
    print(f"test accuracy {accuracy:.4f}, exact zeros in decayed weights {report.sparsity:.4f}")


if __name__ == "__main__":
    main()
