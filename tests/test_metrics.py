"Metrics against scikit-learn and a brute-force AUPRO; bounds; bad input."
import warnings
import numpy as np
import pytest
import torch
from scipy import ndimage
from flowrepro import metrics as M
from flowrepro.metrics import aupro, auroc, average_precision, evaluate, f1_max, f1_max_threshold, fpr_threshold

NAMES = ['image_auroc', 'image_ap', 'image_f1max', 'pixel_auroc', 'pixel_ap', 'pixel_f1max', 'aupro_30', 'aupro_05']
ROUND = 1e-11  # float64 sums


def masks_of(rng, n=6, h=12, w=14, good=0.4):
    "Random rectangles, some touching, some images good; at least one image of each kind."
    m = np.zeros((n, h, w), bool)
    for i in range(n):
        if i == 0 or (i > 1 and rng.random() > good):
            for _ in range(rng.integers(1, 4)):
                r, c = rng.integers(0, h - 1), rng.integers(0, w - 1)
                m[i, r:r + rng.integers(1, 5), c:c + rng.integers(1, 5)] = True
    return m


def brute_pro(maps, masks, limit):
    "Every distinct threshold, an explicit loop over regions, straight lines between the points."
    regions = []
    for i, m in enumerate(masks):
        ids, k = ndimage.label(m, np.ones((3, 3)))
        regions += [(i, ids == r) for r in range(1, k + 1)]
    pts = [(0.0, 0.0)]
    for t in sorted({float(v) for v in maps.ravel()}, reverse=True):
        over = [np.mean(maps[i][r] >= t) for i, r in regions]
        pts.append((np.mean(maps[~masks] >= t), np.mean(over)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(pts[:-1], pts[1:]):
        if x1 <= x0 or x0 >= limit: continue
        e = min(x1, limit)
        area += (e - x0)*(y0 + (y0 + (y1 - y0)*(e - x0)/(x1 - x0)))/2
    return area/limit


def sk(scores, y):
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
    s, y = np.asarray(scores, np.float64).ravel(), np.asarray(y).ravel()
    p, r, _ = precision_recall_curve(y, s)
    with np.errstate(invalid='ignore', divide='ignore'): f1 = np.nanmax(2*p*r/(p + r))
    return roc_auc_score(y, s), average_precision_score(y, s), f1


def truth(maps, masks, image_scores=None, labels=None):
    "The eight metrics from scikit-learn and brute force."
    s = maps.max((1, 2)) if image_scores is None else image_scores
    y = masks.any((1, 2)) if labels is None else labels
    v = [*sk(s, y), *sk(maps, masks), brute_pro(maps, masks, 0.3), brute_pro(maps, masks, 0.05)]
    return dict(zip(NAMES, map(float, v)))


def assert_equal(e, t, tol=ROUND):
    for k in NAMES: assert abs(e[k] - t[k]) <= tol, (k, e[k], t[k])


def assert_bounded(e, t):
    for k in NAMES: assert abs(e[k] - t[k]) <= e[k + '_bound'] + ROUND, (k, e[k], t[k], e[k + '_bound'])


SCORES = {
    'normal': lambda g, m: g.normal(size=m.shape) + m,
    'tied': lambda g, m: (g.integers(0, 5, m.shape) + m).astype(float),
    'two values': lambda g, m: (g.random(m.shape) < 0.3 + 0.3*m).astype(float),
    'constant': lambda g, m: np.full(m.shape, 3.7),
    'perfect': lambda g, m: g.random(m.shape) + 2*m,
    'inverted': lambda g, m: g.random(m.shape) - 2*m,
    'scaled by 1e3': lambda g, m: 1e3*(g.normal(size=m.shape) + m),
    'scaled by -1e3': lambda g, m: -1e3*(g.normal(size=m.shape) + m),
    'log-likelihood': lambda g, m: -900 + 300*(g.normal(size=m.shape) + m),
    'tiny differences': lambda g, m: -900 + 1e-6*(g.integers(0, 50, m.shape) + 9*m),
    'huge and tiny': lambda g, m: np.where(g.random(m.shape) < .5, 1e30, 1e-30)*(g.normal(size=m.shape) + m),
    'beyond float32': lambda g, m: 1e300*(g.normal(size=m.shape) + m),
    'subnormal': lambda g, m: 1e-44*np.round(3*(g.normal(size=m.shape) + m)),
}


@pytest.mark.parametrize('name', SCORES)
@pytest.mark.parametrize('dtype', [np.float64, np.float32])
def test_equals_sklearn_and_brute_force(name, dtype):
    if name == 'beyond float32' and dtype == np.float32: pytest.skip('not representable')
    for seed in range(3):
        g = np.random.default_rng(seed)
        masks = masks_of(g)
        maps = SCORES[name](g, masks).astype(dtype)
        t = truth(maps, masks)
        assert_equal(evaluate(maps, masks, tol=0), t)               # exact on demand
        e = evaluate(maps, masks, bounds=True)
        assert_bounded(e, t)
        assert max(e[k + '_bound'] for k in NAMES) <= 1e-5
        coarse = evaluate(maps, masks, bounds=True, tol=1, bins=1)  # bound only
        assert_bounded(coarse, t)
        assert abs(aupro(maps, masks) - t['aupro_30']) < ROUND
        assert abs(aupro(maps, masks, 0.05) - t['aupro_05']) < ROUND
        assert np.allclose([auroc(maps, masks), average_precision(maps, masks), f1_max(maps, masks)],
                           [t['pixel_auroc'], t['pixel_ap'], t['pixel_f1max']], rtol=0, atol=ROUND)


def test_keys_and_types():
    g = np.random.default_rng(0); m = masks_of(g)
    e = evaluate(g.normal(size=m.shape), m)
    assert list(e) == NAMES and all(type(v) is float and 0 <= v <= 1 for v in e.values())
    assert list(evaluate(g.normal(size=m.shape), m, bounds=True)) == NAMES + [k + '_bound' for k in NAMES]


def test_differences_below_float32_are_seen():
    g = np.random.default_rng(0); m = masks_of(g)
    maps = -900 + 1e-9*(g.random(m.shape) + 2*m)
    assert len(np.unique(maps.astype(np.float32))) == 1
    e = evaluate(maps, m, bounds=True)
    assert e['pixel_auroc'] == 1 and e['aupro_30'] == pytest.approx(1) and e['pixel_auroc_bound'] == 0
    # rounded to float32 nothing is known, and it says so
    assert evaluate(maps, m, bounds=True, tol=1)['pixel_auroc_bound'] == 0.5


def test_integers_keep_their_precision():
    assert auroc(np.array([2**24, 2**24 + 1], np.int32), [0, 1]) == 1.0


def test_zeros_of_both_signs_are_tied():
    g = np.random.default_rng(0); m = masks_of(g)
    z = np.where(m, 0.0, -0.0).astype(np.float32)
    for x in (z, z.astype(np.float64), -z, torch.from_numpy(z)):
        e = evaluate(x, m)
        assert e['pixel_auroc'] == 0.5 and e['image_auroc'] == 0.5 and e['aupro_30'] == pytest.approx(0.15)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_inputs(dtype):
    g = np.random.default_rng(1); m = masks_of(g)
    x = torch.from_numpy(g.normal(size=m.shape) + m).to(dtype).requires_grad_()
    t = truth(x.detach().double().numpy(), m)
    e = evaluate(x, torch.from_numpy(m), image_scores=x.amax((1, 2)), labels=torch.from_numpy(m.any((1, 2))).int(),
                 tol=0)
    assert_equal(e, t)
    if dtype == torch.float16: assert_equal(evaluate(x.detach().numpy(), m, tol=0), t)


def test_layouts_lists_and_integers():
    g = np.random.default_rng(2); m = masks_of(g)
    x = np.round(9*g.normal(size=m.shape)).astype(np.int16)
    t = truth(x, m)
    wide = np.zeros(m.shape[:2] + (2*m.shape[2],)); wide[..., ::2] = x
    for a, b in ((x, m), (wide[..., ::2], m), (np.asfortranarray(x), np.asfortranarray(m)), (x.tolist(), m.tolist()),
                 (x[:, ::-1, ::-1], m[:, ::-1, ::-1]), (x, m.astype(np.uint8)*3), (x, m.astype(np.float32)),
                 (torch.from_numpy(x).mT, torch.from_numpy(m).mT), (x.transpose(0, 2, 1), m.transpose(0, 2, 1))):
        assert_equal(evaluate(a, b, tol=0), t)


def test_inputs_are_left_alone():
    m = masks_of(np.random.default_rng(0))
    x = np.where(m, 1.0, -0.0).astype(np.float32); x.flags.writeable = m.flags.writeable = False
    before = x.tobytes()
    evaluate(x, m)
    assert x.tobytes() == before


@pytest.mark.parametrize('seed', range(12))
def test_bound_holds_with_coarse_bins(seed):
    g = np.random.default_rng(seed)
    m = masks_of(g, 20, 48, 40)
    shift, scale = g.choice([0, -900, 5, 1e4]), 10.0**g.integers(-3, 4)
    x = ((g.normal(size=m.shape) + g.uniform(0, 2)*m)*scale + shift).astype(g.choice(['f4', 'f8']))
    if seed % 3 == 0: x = np.round(x/scale*4)*scale
    t = {k: v for k, v in zip(NAMES, [*sk(x.max((1, 2)), m.any((1, 2))), *sk(x, m), aupro(x, m), aupro(x, m, .05)])}
    widths = []
    for bins in (1, 100, 3000, 2**15, 2**20):
        e = evaluate(x, m, bounds=True, bins=bins, tol=1)
        assert_bounded(e, t)
        widths.append(e['pixel_auroc_bound'])
    assert widths[-1] <= widths[0]
    assert_equal(evaluate(x, m, bins=1, tol=0), t)   # everything mixed is sorted
    fell = evaluate(x, m, bins=1, bounds=True)       # falls back where the bound is too wide
    assert_equal(fell, t, 1.1e-5)
    assert max(fell[k + '_bound'] for k in NAMES) <= 1e-5


def test_coarse_bounds_are_real():
    "The case above does have bounds that matter."
    g = np.random.default_rng(0); m = masks_of(g, 20, 48, 40)
    e = evaluate((g.normal(size=m.shape) + m + 100).astype('f4'), m, bounds=True, bins=1, tol=1)
    assert all(e[k + '_bound'] > 1e-4 for k in NAMES[3:])
    assert all(e[k + '_bound'] == 0 for k in NAMES[:3])


def test_intervals_hold_for_every_order_inside_a_bin():
    "Any order of what a mixed bin holds, ties included, stays inside the interval."
    g = np.random.default_rng(0)
    for _ in range(300):
        k = g.integers(2, 6)
        p, n = g.integers(0, 4, k), g.integers(0, 4, k)
        p[0] += 1; n[-1] += 1
        s, y, w = [], [], []
        for i in range(k):
            c = p[i] + n[i]
            s.append(-10*i + g.integers(0, 4, c)); y.append(np.arange(c) < p[i]); w.append(g.random(p[i]))
        tot = sum(a.sum() for a in w)
        q = np.array([a.sum() for a in w])/tot
        s, y = np.concatenate(s), np.concatenate(y)
        b = M.Bins(p, n, q, np.zeros(k, bool))
        for f, v in zip((M.auroc_interval, M.ap_interval, M.f1max_interval), sk(s, y)):
            lo, hi = f(b)
            assert lo - 1e-12 <= v <= hi + 1e-12, (f.__name__, lo, v, hi)
        wy = np.zeros(len(s)); wy[y] = np.concatenate(w)/tot
        u, inv = np.unique(s, return_inverse=True)
        exact = M.Bins(*(np.bincount(inv, weights=a, minlength=len(u))[::-1] for a in (y*1., ~y*1., wy)),
                       np.ones(len(u), bool))
        for limit in (0.05, 0.3, 1.0):
            lo, hi = M.aupro_interval(b, limit); a, a2 = M.aupro_interval(exact, limit)
            assert abs(a - a2) < 1e-15 and lo - 1e-12 <= a <= hi + 1e-12


def test_monotone_transforms_change_nothing():
    g = np.random.default_rng(3)
    for seed in range(4):
        m = masks_of(np.random.default_rng(seed))
        x = np.round(2*g.normal(size=m.shape) + m, 2)
        a = evaluate(x, m, tol=0)
        for f in (np.exp, lambda v: 1e3*v, lambda v: v/7 - 900, lambda v: v**3, np.arctan):
            b = evaluate(f(x), m, tol=0)
            assert_equal(a, b)


def test_order_of_images_changes_nothing():
    g = np.random.default_rng(4); m = masks_of(g, 30, 64, 64)
    x = (g.normal(size=m.shape) + m).astype(np.float32)
    a = evaluate(x, m)
    for i in (g.permutation(30), g.permutation(30)): assert_equal(a, evaluate(x[i], m[i]), 1e-12)


def test_blocks_do_not_matter():
    "Images larger than a block, and many in one block."
    g = np.random.default_rng(5)
    for shape in ((3, 300, 300), (700, 5, 3), (2, 1, 90000)):
        m = g.random(shape) < 0.05; m[-1] = False
        x = np.round(g.normal(size=shape) + m, 1)
        v = [*sk(x, m), aupro(x, m), aupro(x, m, .05)]
        e = evaluate(x, m, tol=0)
        assert np.allclose([e[k] for k in NAMES[3:]], v, rtol=0, atol=ROUND)


def test_regions_touching_at_corners_are_one_and_images_are_separate():
    m = np.zeros((2, 4, 4), bool); m[0, 0, 0] = m[0, 1, 1] = m[1, 0, 0] = True
    x = np.zeros(m.shape); x[0, 0, 0] = 1
    fpr, pro = M.pro_curve(x, m)
    assert pro.tolist() == [0, 0.25, 1] and fpr.tolist() == [0, 0, 1]


@pytest.mark.parametrize("given", [(np.zeros((20, 8, 8)), np.zeros(20)), np.zeros((20, 2)), 1.0],
                         ids=["what predict returns", "table", "number"])
def test_threshold_of_scores_alone(given):
    with pytest.raises(ValueError, match=r"one score an image, \(n,\): maps, scores = model.predict"): fpr_threshold(given)


def test_pro_curve_of_one_kind():
    for m in (np.zeros((1, 4, 4), bool), np.ones((1, 4, 4), bool)):
        with pytest.raises(ValueError, match="normal pixels and defects are needed"): M.pro_curve(np.zeros(m.shape), m)


def test_small_regions_count_as_much_as_large_ones():
    m = np.zeros((1, 20, 20), bool); m[0, :9, :9] = True; m[0, 15, 15] = True
    x = np.zeros(m.shape); x[0, 15, 15] = 1
    assert evaluate(np.concatenate([x, 0*x]), np.concatenate([m, 0*m]))['aupro_30'] == pytest.approx(.5 + .5*.15)


def test_one_region():
    g = np.random.default_rng(0); m = np.zeros((3, 9, 9), bool); m[1, 2:5, 2:5] = True
    x = g.normal(size=m.shape) + m
    assert_equal(evaluate(x, m, tol=0), truth(x, m))
    assert evaluate(m.astype(float), m)['aupro_05'] == pytest.approx(1)


def test_constant_scores():
    m = masks_of(np.random.default_rng(0)); P, T = m.sum(), m.size
    for c in (0.0, -900.0, 1e-30, 123.456):
        e = evaluate(np.full(m.shape, c), m)
        assert e['pixel_auroc'] == e['image_auroc'] == 0.5
        assert e['pixel_ap'] == pytest.approx(P/T) and e['pixel_f1max'] == pytest.approx(2*P/(P + T))
        assert e['aupro_30'] == pytest.approx(.15) and e['aupro_05'] == pytest.approx(.025)


def test_threshold_gives_the_f1():
    g = np.random.default_rng(0); y = g.random(200) < .3; s = np.round(g.normal(size=200) + y, 1)
    f, t = f1_max_threshold(s, y)
    tp = ((s >= t) & y).sum()
    assert f == f1_max(s, y) == pytest.approx(2*tp/(y.sum() + (s >= t).sum()))


# --- awkward data -------------------------------------------------------------------------------

def caught(*a, **k):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        e = evaluate(*a, **k)
    return e, [str(x.message) for x in w]


def test_good_images_only():
    x = np.random.default_rng(0).normal(size=(5, 8, 8))
    e, w = caught(x, np.zeros(x.shape, bool), bounds=True)
    assert all(np.isnan(v) for v in e.values()) and len(e) == 16
    assert any('image_auroc' in s and 'all 5 images are normal' in s for s in w)
    assert any('aupro_30' in s and 'all 5 masks are empty' in s for s in w)


def test_anomalous_images_only():
    g = np.random.default_rng(0); m = masks_of(g)[:1]; x = g.normal(size=m.shape)
    e, w = caught(x, m)
    assert np.isnan([e[k] for k in NAMES[:3]]).all() and not np.isnan([e[k] for k in NAMES[3:]]).any()
    assert len(w) == 1 and 'image_auroc, image_ap, image_f1max' in w[0] and 'anomalous' in w[0] and 'pixel' not in w[0]


def test_masks_full():
    x = np.random.default_rng(0).normal(size=(2, 8, 8))
    e, w = caught(x, np.ones(x.shape, bool), labels=[0, 1])
    assert np.isnan([e[k] for k in NAMES[3:]]).all() and e['image_auroc'] in (0, 1)
    assert any('128 pixels as defects' in s for s in w)


def test_no_masks():
    x = np.random.default_rng(0).normal(size=(6, 8, 8)); y = [0, 1, 0, 1, 0, 1]
    e, w = caught(x, None, labels=y)
    assert not w and np.isnan([e[k] for k in NAMES[3:]]).all()
    assert np.allclose([e[k] for k in NAMES[:3]], sk(x.max((1, 2)), y))
    with pytest.raises(ValueError, match='masks and labels are both None'): evaluate(x, None)


def test_labels_that_contradict_masks():
    g = np.random.default_rng(0); m = masks_of(g); x = g.normal(size=m.shape)
    y = m.any((1, 2)).astype(int); y[1] = 1
    assert not m[1].any()
    e, w = caught(x, m, labels=y)
    assert len(w) == 1 and '1 of 6 images are labelled anomalous but have an empty mask (first: image 1)' in w[0]
    assert_equal(e, truth(x, m, labels=y), 1e-5)
    y = m.any((1, 2)).astype(int); y[0] = 0
    e, w = caught(x, m, labels=y)
    assert len(w) == 1 and 'labelled normal but have defect pixels' in w[0] and 'image 0' in w[0]
    assert_equal(e, truth(x, m, labels=y), 1e-5)


def test_given_image_scores():
    g = np.random.default_rng(0); m = masks_of(g); x = g.normal(size=m.shape); s = g.normal(size=6)
    assert_equal(evaluate(x, m, s), truth(x, m, s), 1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_scores_that_are_not_finite(bad, dtype):
    g = np.random.default_rng(0); m = masks_of(g); x = g.normal(size=m.shape).astype(dtype)
    b = x.copy(); b[4, 2, 2] = bad
    with pytest.raises(ValueError, match='image 4 holds 1 '): evaluate(b, m)
    with pytest.raises(ValueError, match='image 4'): evaluate(b, None, labels=m.any((1, 2)))
    with pytest.raises(ValueError, match='image 4'): aupro(b, m)
    s = x.max((1, 2)); s[3] = bad
    with pytest.raises(ValueError, match='image 3'): evaluate(x, m, s)
    with pytest.raises(ValueError, match='score 3'): auroc(s, m.any((1, 2)))


def test_shapes_that_do_not_fit():
    m = masks_of(np.random.default_rng(0)); x = np.random.default_rng(0).normal(size=m.shape)
    for f in (evaluate, aupro):
        with pytest.raises(ValueError, match=r'\(6, 12, 14\).*\(6, 14, 12\)'): f(x, m.transpose(0, 2, 1))
        with pytest.raises(ValueError, match=r'\(5, 12, 14\).*\(6, 12, 14\)'): f(x[:5], m)
        with pytest.raises(ValueError, match='must be'): f(x[0], m[0])
        with pytest.raises(ValueError, match='must be'): f(x[:0], m[:0])
    with pytest.raises(ValueError, match=r'image_scores \(5,\) do not fit 6'): evaluate(x, m, np.zeros(5))
    with pytest.raises(ValueError, match=r'labels \(7,\) do not fit 6'): evaluate(x, m, labels=np.zeros(7))
    with pytest.raises(ValueError, match=r'\(4,\).*\(3,\)'): auroc(np.zeros(4), np.zeros(3))
    with pytest.raises(ValueError, match='no scores'): average_precision([], [])


def test_values_that_make_no_sense():
    m = masks_of(np.random.default_rng(0)); x = np.random.default_rng(0).normal(size=m.shape)
    with pytest.raises(ValueError, match='masks hold values other than 0 and 1'): evaluate(x, m*0.4)
    with pytest.raises(ValueError, match='labels hold values'): evaluate(x, m, labels=np.full(6, .5))
    with pytest.raises(ValueError, match='labels hold integers below 0'): auroc([1., 2, 3], [-1, 1, 1])
    with pytest.raises(ValueError, match='masks hold integers below 0'): evaluate(x, m*np.int8(-1))
    with pytest.raises(ValueError, match='real numbers'): evaluate(x + 1j, m)
    with pytest.raises(ValueError, match='masks must be'): evaluate(x, m.astype(str))
    for kw in (dict(tol=-1), dict(bins=0), dict(tol=float('nan'))):
        with pytest.raises(ValueError, match='tol must be'): evaluate(x, m, **kw)
    for limit in (0, 1.1, float('nan')):
        with pytest.raises(ValueError, match='limit'): aupro(x, m, limit)


def test_plain_functions_warn_on_one_class():
    for f in (auroc, average_precision, f1_max):
        for y in ([0, 0], [1, 1]):
            with pytest.warns(UserWarning, match='NaN, because all 2 labels'): assert np.isnan(f([1, 2], y))
    with pytest.warns(UserWarning, match='aupro'): assert np.isnan(aupro(np.zeros((1, 2, 2)), np.zeros((1, 2, 2))))
    with pytest.warns(UserWarning, match='NaN'): assert np.isnan(f1_max_threshold([1, 2], [0, 0])).all()


def test_no_warning_on_sound_data():
    g = np.random.default_rng(0); m = masks_of(g)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        evaluate(g.normal(size=m.shape), m, labels=m.any((1, 2))); evaluate(1e300*g.normal(size=m.shape), m)


def test_keys_keep_the_order():
    g = np.random.default_rng(0)
    v = np.sort(
        np.concatenate([g.normal(size=500)*10.0**g.integers(-44, 38, 500), [0, 1e-45, -1e-45, 3.4e38, -3.4e38]]).astype(
            np.float32) + 0)
    k = M.key(v).astype(np.int64)
    assert ((np.diff(k) > 0) == (np.diff(v) > 0)).all() and (np.diff(k) >= 0).all()


def test_extra_memory_is_small():
    "Far less than a sort of all pixels needs; the maps take 16 MiB here."
    import tracemalloc
    g = np.random.default_rng(0); m = np.zeros((64, 256, 256), bool); m[::2, 40:60, 40:60] = True
    x = g.normal(size=m.shape).astype(np.float32) + m
    tracemalloc.start()
    try: evaluate(x, m); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 80*2**20


# -- a threshold from good images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, fpr", [(19, 0.05), (20, 0.05), (99, 0.01), (9, 0.1), (10, 0.5), (57, 0.23), (99, 0.45)])
def test_threshold_holds_its_promise(n, fpr):
    """By exchangeability, exactly: among n + 1 distinct scores, each one left out in turn, at most a share `fpr` lies
    above the threshold of the others; one rank higher it would be too many."""
    scores = np.random.default_rng(0).permutation(n + 1).astype(float)
    above = sum(s > fpr_threshold(np.delete(scores, i), fpr) for i, s in enumerate(scores))
    assert above <= fpr * (n + 1) + 1e-9 and above + 1 > fpr * (n + 1) + 1e-9


@pytest.mark.parametrize("scores, fpr, words",
                         [(range(18), 0.05, "18 good images .* give 19 or more, or fpr of 0.0527"),
                          (range(9), 0, "between 0 and 1"), (range(9), 1.0, "between 0 and 1"),
                                                ([], 0.1, "no scores"), ([1.0, np.nan], 0.5, "not finite")], ids=str)
def test_threshold_refuses(scores, fpr, words):
    with pytest.raises(ValueError, match=words): fpr_threshold(np.array(list(scores), float), fpr)


def test_threshold_of_ties_and_tensors():
    assert fpr_threshold(torch.tensor([1.0] * 19)) == 1.0
    for n in range(1, 60):  # the rate that is told holds
        with pytest.raises(ValueError) as told: fpr_threshold(np.zeros(n), 1e-3)
        assert fpr_threshold(np.zeros(n), float(str(told.value).split("or fpr of ")[1].split()[0])) == 0
    assert fpr_threshold(torch.arange(99, dtype=torch.bfloat16), 0.5) == 49


def test_double_tensors_keep_their_precision():
    x = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert auroc(x, [0, 1]) == 1 and M.as_float(x).tolist() == x.tolist()


def test_which_class_is_there():
    "The warning says what all of them are, and what none is."
    for y, words in (([0, 0], 'all 2 labels are normal and none is anomalous'),
                     ([1, 1], 'all 2 labels are anomalous and none is normal')):
        with pytest.warns(UserWarning, match=words): auroc([1, 2], y)


def test_as_many_of_another_shape():
    "Flattened, they would be paired in another order."
    with pytest.raises(ValueError, match=r'\(2, 3\).*\(3, 2\)'): auroc(np.zeros((2, 3)), np.eye(3, 2))


def test_highest_of_thresholds_that_are_as_good():
    f, t = f1_max_threshold([4, 3, 2, 1], [1, 0, 0, 1])  # 2/3 at 4 and at 1
    assert f == pytest.approx(2/3) and t == 4


def test_aupro_up_to_one():
    "The whole curve, its last point included."
    g = np.random.default_rng(0); m = masks_of(g); x = np.round(g.normal(size=m.shape) + m, 1)
    assert aupro(x, m, 1.0) == pytest.approx(brute_pro(x, m, 1.0), abs=ROUND)


def test_rounding_in_one_block_alone():
    "Whether float32 holds the scores is asked of every block, whatever the last one holds."
    g = np.random.default_rng(0); m = np.zeros((2, 256, 256), bool); m[0, :40, :40] = True
    x = np.full(m.shape, 5.0); x[0] = -900 + 1e-9*(g.random(m.shape[1:]) + 0.5*m[0])
    e = evaluate(x, m, bounds=True)
    assert e['pixel_auroc'] == pytest.approx(auroc(x, m), abs=1e-5) and auroc(x, m) > 0.4


def test_tol_is_the_half_width():
    "Just below the widest bound the bins are sorted, just above it they stand."
    g = np.random.default_rng(0); m = masks_of(g, 20, 48, 40); x = (g.normal(size=m.shape) + m).astype('f4')
    wide = lambda e: max(e[k + '_bound'] for k in NAMES)
    w = wide(evaluate(x, m, bounds=True, tol=1, bins=300))
    assert w > 1e-5
    assert wide(evaluate(x, m, bounds=True, tol=0.9*w, bins=300)) == 0
    assert wide(evaluate(x, m, bounds=True, tol=1.1*w, bins=300)) == w


def test_columns_are_no_labels_and_no_scores():
    "(N, 1) would be compared with (N,) by broadcasting."
    g = np.random.default_rng(0); m = masks_of(g); x = g.normal(size=m.shape)
    with pytest.raises(ValueError, match=r'labels \(6, 1\) do not fit 6'): evaluate(x, m, labels=m.any((1, 2))[:, None])
    with pytest.raises(ValueError, match=r'image_scores \(6, 1\) do not fit 6'): evaluate(x, m, x.max((1, 2))[:, None])


def test_one_defect_pixel_contradicts_a_normal_label():
    x = np.random.default_rng(0).normal(size=(3, 4, 4)); m = np.zeros(x.shape, bool); m[0] = True; m[1, 2, 2] = True
    _, w = caught(x, m, labels=[1, 0, 0])
    assert any('1 of 3 images are labelled normal but have defect pixels' in s for s in w)
