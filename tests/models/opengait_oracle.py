"""The five models once more, naively, from the published layer tables: functions of OpenGait's keys and of clips.

Strips, parts and clips are loops, nothing is shared with the package. For every variant, the tables say which layers
have strips and where pooling is; channel counts come from the weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PYRAMID = (16, 8, 4, 2, 1)
# Plain stacks: a number is a convolution applied to so many strips of the height, M a 2 x 2 maximum.
GAITPART = {
    "small": (1, 1, "M", 4, 4, "M", 8, 8),
    "large": (1, 1, "M", 1, 1, "M", 8, 8, 8, 8),
}
BASELINE = {"plain": (1, 1, "M", 1, 1, "M", 1, 1), "narrow": (1, 1, "M", 1, 1, "M", 1, 1, 1, 1)}
BINS = {"grew-baseline": (16,)}
LARGE = ("grew", "ou-mvlp", "grew-bnneck")


def oracle(name: str, variant: str, w: dict[str, Tensor], clips: Tensor, training: bool) -> tuple[Tensor | None, ...]:
    """Features, embedding and logits (or None) of clips (N, S, 64, 44) with weights `w`."""
    if name == "gaitset":
        features = gaitset(w, clips)
        return features, separate(features, w["Head.fc_bin"]), None
    if name == "gaitpart":
        features = gaitpart(w, clips, GAITPART["large" if variant in LARGE else "small"])
        return features, separate(features, w["Head.fc_bin"]), None
    if name == "gaitgl":
        features = gaitgl(w, clips, variant in LARGE)
        gait = separate(features, w["Head0.fc_bin"])
        if variant == "grew-bnneck":
            return features, gait, neck(w, gait, training)
        bnft = norm(w, "Bn", gait, training)
        return features, bnft, separate(bnft, w["Head1.fc_bin"])
    if name == "smplgait":
        layers = BASELINE["narrow" if variant.endswith("baseline") else "plain"]
        frames = [plain(w, "Backbone.forward_block.feature", clip.unsqueeze(1), layers) for clip in clips]
        features = pyramid(torch.stack([maps.amax(0) for maps in frames]), BINS.get(variant, PYRAMID))
    else:
        maps = resnet(w, clips.flatten(0, 1).unsqueeze(1), training).unflatten(0, clips.shape[:2])
        features = pyramid(maps.amax(1), (16,))
    embedding = separate(features, w["FCs.fc_bin"])
    return features, embedding, neck(w, embedding, training)


def plain(w: dict[str, Tensor], key: str, x: Tensor, layers: tuple) -> Tensor:
    """A Sequential of convolution, LeakyReLU and pooling, each of which has a number."""
    number = 0
    for layer in layers:
        if layer == "M":
            x, number = F.max_pool2d(x, 2, 2), number + 1
            continue
        weight = w[f"{key}.{number}.conv.weight"]
        rows = x.shape[2] // layer
        strips = [x[:, :, i * rows : (i + 1) * rows] for i in range(layer)]
        x = torch.cat([F.conv2d(strip, weight, padding=weight.shape[-1] // 2) for strip in strips], 2)
        x, number = F.leaky_relu(x, 0.01), number + 2
    return x


def pyramid(maps: Tensor, bins: tuple[int, ...]) -> Tensor:
    strips = []
    for count in bins:
        rows = maps.shape[2] // count
        for i in range(count):
            strip = maps[:, :, i * rows : (i + 1) * rows].flatten(2)
            strips.append(strip.mean(2) + strip.amax(2))
    return torch.stack(strips, 2)


def separate(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([x[:, :, p] @ weight[p] for p in range(x.shape[2])], 2)


def norm(w: dict[str, Tensor], key: str, x: Tensor, training: bool) -> Tensor:
    others = [dim for dim in range(x.dim()) if dim != 1]
    column = (1, -1) + (1,) * (x.dim() - 2)
    mean, var = w[f"{key}.running_mean"], w[f"{key}.running_var"]
    if training:
        mean, var = x.mean(others), x.var(others, correction=0)
    x = (x - mean.view(column)) / torch.sqrt(var.view(column) + 1e-5)
    return x * w[f"{key}.weight"].view(column) + w[f"{key}.bias"].view(column)


def neck(w: dict[str, Tensor], embedding: Tensor, training: bool) -> Tensor:
    x = norm(w, "BNNecks.bn1d", embedding.flatten(1), training).view_as(embedding)
    cosines = []
    for p in range(x.shape[2]):
        weight = w["BNNecks.fc_bin"][p]
        cosines.append((x[:, :, p] / x[:, :, p].norm(dim=1, keepdim=True)) @ (weight / weight.norm(dim=0)))
    return torch.stack(cosines, 2)


def gaitset(w: dict[str, Tensor], clips: Tensor) -> Tensor:
    outputs = []
    for clip in clips:
        one = plain(w, "set_block1.forward_block", clip.unsqueeze(1), (1, 1, "M"))
        two = plain(w, "set_block2.forward_block", one, (1, 1, "M"))
        three = plain(w, "set_block3.forward_block", two, (1, 1)).amax(0, keepdim=True)
        whole = plain(w, "gl_block2", one.amax(0, keepdim=True), (1, 1, "M")) + two.amax(0, keepdim=True)
        whole = plain(w, "gl_block3", whole, (1, 1)) + three
        outputs.append(torch.cat((pyramid(three, PYRAMID), pyramid(whole, PYRAMID)), 2))
    return torch.cat(outputs)


def gaitpart(w: dict[str, Tensor], clips: Tensor, layers: tuple) -> Tensor:
    outputs = []
    for clip in clips:
        maps = plain(w, "Backbone.forward_block.feature", clip.unsqueeze(1), layers)
        strips = pyramid(maps, (16,))  # (S, C, 16)
        parts = []
        for p in range(16):
            x, total = strips[:, :, p].t().unsqueeze(0), 0  # (1, C, S)
            for key, last, window in (("conv1d3x1", 0, 3), ("conv1d3x3", 1, 5)):
                weights = [w[f"TFA.pooling_func.{key}.{p}.{i}.conv.weight"] for i in (0, 2)]
                score = F.conv1d(F.leaky_relu(F.conv1d(x, weights[0], padding=1), 0.01), weights[1], padding=last)
                edge = window // 2
                template = F.avg_pool1d(x, window, 1, edge) + F.max_pool1d(x, window, 1, edge)
                total = total + template * torch.sigmoid(score)
            parts.append(total.amax(2))
        outputs.append(torch.stack(parts, 2))
    return torch.cat(outputs)


def gaitgl(w: dict[str, Tensor], clips: Tensor, large: bool) -> Tensor:
    x = clips.unsqueeze(1)
    frames = clips.shape[1]
    if frames < 3:
        x = torch.cat([x] * (3 if frames == 1 else 2), 2)
    for number in (0, 2) if large else (0,):
        x = F.leaky_relu(F.conv3d(x, w[f"conv3d.{number}.conv3d.weight"], padding=1), 0.01)
    x = F.leaky_relu(F.conv3d(x, w["LTA.0.conv3d.weight"], stride=(3, 1, 1)), 0.01)
    strips = 2 if large else 8
    layers = ("0.", "1.") if large else ("",)

    def layer(x: Tensor, key: str, stacked: bool) -> Tensor:
        whole = F.conv3d(x, w[f"{key}global_conv3d.conv3d.weight"], padding=1)
        rows = x.shape[3] // strips
        local = torch.cat(
            [
                F.conv3d(x[:, :, :, i * rows : (i + 1) * rows], w[f"{key}local_conv3d.conv3d.weight"], padding=1)
                for i in range(strips)
            ],
            3,
        )
        if stacked:
            return F.leaky_relu(torch.cat((whole, local), 3), 0.01)
        return F.leaky_relu(whole, 0.01) + F.leaky_relu(local, 0.01)

    for number in layers:
        x = layer(x, f"GLConvA0.{number}", False)
    x = F.max_pool3d(x, (1, 2, 2), (1, 2, 2))
    for number in layers:
        x = layer(x, f"GLConvA1.{number}", False)
    for number in layers:
        x = layer(x, f"GLConvB2.{number}", number == layers[-1])
    rows = x.amax(2).clamp(min=1e-6)
    return rows.pow(w["HPP.p"]).mean(3).pow(1 / w["HPP.p"])


def resnet(w: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    trunk = "Backbone.forward_block"
    x = F.relu(norm(w, f"{trunk}.bn1", F.conv2d(x, w[f"{trunk}.conv1.conv.weight"], padding=1), training))
    for stage, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):
        key = f"{trunk}.layer{stage}.0"
        y = F.conv2d(x, w[f"{key}.conv1.weight"], stride=stride, padding=1)
        y = F.conv2d(F.relu(norm(w, f"{key}.bn1", y, training)), w[f"{key}.conv2.weight"], padding=1)
        y = norm(w, f"{key}.bn2", y, training)
        if stage > 1:
            x = norm(w, f"{key}.downsample.1", F.conv2d(x, w[f"{key}.downsample.0.weight"], stride=stride), training)
        x = F.relu(x + y)
    return x
