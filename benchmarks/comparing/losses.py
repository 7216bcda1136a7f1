"""The losses that no library has: those of ISD, CO2 and DeepCluster-v2.

All embeddings are unit vectors, so a dot product is a cosine similarity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def similarity_distillation(v: Tensor, u: Tensor, anchors: Tensor, student: float, teacher: float) -> Tensor:
    """Return ISD's loss: the student learns the teacher's similarities to the anchors (arXiv 2012.09259, section 3).

        p(i) = exp(u·aᵢ / τt) / Σⱼ exp(u·aⱼ / τt),   q(i) the same with v and τs,
        loss = KL(p ‖ q), mean over the batch

    Args:
        v: [B, D] unit vectors of the student.
        u: [B, D] unit vectors of the teacher, from other views of the same images.
        anchors: [N, D] unit vectors, earlier embeddings of the teacher.
        student: τs.
        teacher: τt.

    Returns:
        A scalar; only v receives a gradient.
    """
    p = (u.detach() @ anchors.T / teacher).softmax(dim=1)  # [B, N]
    log_q = (v @ anchors.T / student).log_softmax(dim=1)
    return F.kl_div(log_q, p, reduction="batchmean")


def consistent_contrast(
    q: Tensor, p: Tensor, negatives: Tensor, temperature: float, consistency: float, alpha: float
) -> Tensor:
    """Return CO2's loss: MoCo's, plus the difference of q's and p's similarities to the negatives (arXiv 2010.02217).

        L_ins = −log exp(q·p / τ) / (exp(q·p / τ) + Σᵢ exp(q·nᵢ / τ))
        Q(i) = exp(q·nᵢ / τc) / Σⱼ exp(q·nⱼ / τc),   P(i) the same with p
        L = L_ins + α (KL(P ‖ Q) + KL(Q ‖ P)) / 2,   mean over the batch

    lightly has this term too (``CO2Regularizer``), but its value has no gradient, and its distributions include the
    positive.

    Args:
        q: [B, D] unit vectors of the query views.
        p: [B, D] unit vectors of the other views, from the target encoder.
        negatives: [N, D] unit vectors.
        temperature: τ.
        consistency: τc.
        alpha: α.

    Returns:
        A scalar; only q receives a gradient.
    """
    p = p.detach()
    by_q, by_p = q @ negatives.T, p @ negatives.T  # [B, N]
    logits = torch.cat([(q * p).sum(dim=1, keepdim=True), by_q], dim=1) / temperature
    instance = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
    log_q, log_p = (by_q / consistency).log_softmax(dim=1), (by_p / consistency).log_softmax(dim=1)
    symmetric = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) + F.kl_div(
        log_p, log_q, reduction="batchmean", log_target=True
    )
    return instance + alpha * symmetric / 2


def cluster_prediction(z: Tensor, centroids: Tensor, assignments: Tensor, temperature: float) -> Tensor:
    """Return DeepCluster-v2's loss: predict each image's centroid of the last epoch (arXiv 2006.09882).

        loss = −log exp(z·c_a / τ) / Σⱼ exp(z·cⱼ / τ),   mean over images and clusterings

    Args:
        z: [B, D] unit vectors.
        centroids: [H, K, D] unit vectors of H clusterings.
        assignments: [H, B], the indices a; −1 for images without one.
        temperature: τ.

    Returns:
        A scalar; 0 if no image has an assignment.
    """
    logits = torch.einsum("bd,hkd->hbk", z, centroids) / temperature
    known = (assignments >= 0).sum().clamp(min=1)
    total = F.cross_entropy(logits.flatten(0, 1), assignments.flatten(), ignore_index=-1, reduction="sum")
    return total / known


def spherical_kmeans(rows: Tensor, clusters: int, seed: int, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Return the centroids [K, D], unit vectors, and the index [N] of the nearest centroid of each row, by FAISS.

    FAISS learns the centroids from a random sample of at most 256 rows per cluster.

    Args:
        rows: [N, D] unit vectors, at least as many as clusters.
        clusters: K.
        seed: seed of the sample and the first centroids.
        iterations: iterations of k-means; 10 in the authors' code.
    """
    import faiss

    points = rows.detach().cpu().float().contiguous().numpy()
    kmeans = faiss.Kmeans(
        points.shape[1], clusters, niter=iterations, spherical=True, seed=seed, min_points_per_centroid=1
    )
    kmeans.train(points)
    nearest = kmeans.index.search(points, 1)[1][:, 0]
    return torch.from_numpy(kmeans.centroids).to(rows.device), torch.from_numpy(nearest).to(rows.device)
