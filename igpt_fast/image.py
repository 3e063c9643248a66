import numpy as np, torch
from igpt_fast import reference

def fit_clusters(images, n_clusters, *, seed=0, pinned=()):
    from sklearn.cluster import MiniBatchKMeans
    pixels = np.asarray(images).reshape(-1, 3).astype(np.float32) / 127.5 - 1.0
    pins = np.asarray(pinned, dtype=np.float32).reshape(-1, 3) / 127.5 - 1.0
    for pin in pins:
        pixels = pixels[(pixels != pin).any(axis=1)]
    km = MiniBatchKMeans(n_clusters - len(pins), random_state=seed, batch_size=4096, n_init=3, max_iter=100)
    return np.concatenate([pins, km.fit(pixels).cluster_centers_.astype(np.float32)])

def quantize(images, clusters):
    x = torch.from_numpy(np.asarray(images)).float() / 127.5 - 1.0
    return reference.quantize(x, torch.from_numpy(clusters)).numpy()
