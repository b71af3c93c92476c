"""The scene reward on pictures whose content is known: true, shuffled, broken and repaired, blended, moved; and the grammar of captions."""

import itertools
import random

import pytest
import torch

from flowrl.types import Prompt, SampleBatch, UserError
from rewards.scene import SceneReward, detect, score_scenes
from rewards.scene_world import BACKGROUND, COLORS, PALETTE, RELATIONS, SHAPES, SIZE, Scene, caption, parse_caption, place, render, shape_coverage

KINDS = [(c, s) for c in range(len(COLORS)) for s in range(len(SHAPES))]
SINGLE, COUNTED = [Scene((k,)) for k in KINDS], [Scene((k,) * n) for k in KINDS for n in (2, 3)]
PAIRS = [Scene(p) for p in itertools.permutations(KINDS, 2)]
RELATED = [Scene(p, r) for p in itertools.permutations(KINDS, 2) for r in range(len(RELATIONS))]
FP32 = {"rtol": 0.0, "atol": 1e-5}


def random_scene(rng):
    return rng.choice(rng.choice([SINGLE, COUNTED, PAIRS, RELATED]))


def random_scenes(seed, count):
    """Scenes, their objects' places and their pictures."""
    rng = random.Random(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    centres = place(scenes, torch.Generator().manual_seed(seed))
    return scenes, centres, render(scenes, centres)


def draw(states):
    """Pictures of (kinds, [(x, y), ...]) whether or not a caption can describe them."""
    centres = torch.tensor([[*places[: len(kinds)], *[(0.0, 0.0)] * (3 - len(kinds))] for kinds, places in states])
    return render([Scene(tuple(kinds)) for kinds, _ in states], centres)


# --- true pictures and wrong ones ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_thousand():
    return random_scenes(0, 2000)


def test_true_pictures_pass(two_thousand):
    scenes, _, images = two_thousand
    graded, strict = score_scenes(images, scenes)
    assert strict.mean() >= 0.99
    assert graded.mean() >= 0.94
    assert graded.min() >= 0.6
    assert graded.max() <= 1


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_true_pictures_pass_wherever_the_objects_lie_in_the_pixel_grid(fraction):
    scenes, centres, _ = random_scenes(1, 500)
    _, strict = score_scenes(render(scenes, centres.floor() + fraction), scenes)
    assert strict.mean() >= 0.98  # rounding moves objects by up to a pixel: a few touch


def test_shuffled_captions_fail(two_thousand):
    scenes, _, images = two_thousand
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1)).tolist()
    graded, strict = score_scenes(images, [scenes[i] for i in order])
    assert strict.mean() <= 0.05
    assert graded.mean() <= 0.45


def test_an_empty_picture_is_worth_nothing():
    images = BACKGROUND.view(1, 3, 1, 1).expand(len(KINDS), 3, SIZE, SIZE)
    graded, strict = score_scenes(images, SINGLE)
    assert graded.max() < 1e-4
    assert strict.eq(0).all()


def test_a_picture_of_noise_is_worth_nothing():
    images = torch.rand(200, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    graded, strict = score_scenes(images, random_scenes(2, 200)[0])
    assert graded.mean() < 0.02
    assert strict.eq(0).all()


@pytest.mark.parametrize(("side", "relation"), [((-1, 0), 0), ((1, 0), 1), ((0, -1), 2), ((0, 1), 3)], ids=RELATIONS)
def test_each_relation_by_hand(side, relation):
    # the first object lies 8 pixels to one side of the middle, the second 8 pixels to the other
    kinds = [(0, 0), (2, 1)]
    places = [(16.0 + 8 * side[0], 16.0 + 8 * side[1]), (16.0 - 8 * side[0], 16.0 - 8 * side[1])]
    graded, strict = score_scenes(draw([(kinds, places)] * 4), [Scene(tuple(kinds), r) for r in range(4)])
    assert strict.tolist() == [float(r == relation) for r in range(4)]
    assert graded.argmax() == relation
    assert graded[[r for r in range(4) if r != relation]].max() < graded[relation] - 0.3


def test_graded_by_hand_from_the_documented_weights():
    # objects on pixel centres: presence and shape are certain to about 1 %
    places = [(8.5, 8.5), (23.5, 8.5), (8.5, 23.5)]
    red_square, red_triangle, blue_square, blue_triangle, green_square = (0, 1), (0, 2), (2, 1), (2, 2), (1, 1)
    cases = [
        ([red_square], Scene((red_square,)), 1.0),
        ([red_square], Scene((blue_square,)), 0.1 + 0.2),  # presence and shape
        ([red_square], Scene((red_triangle,)), 0.1 + 0.2),  # presence and colour
        ([red_square], Scene((blue_triangle,)), 0.1),
        ([red_square], Scene((red_square,) * 2), 1 / 2),
        ([red_square] * 3, Scene((red_square,) * 2), 1 / 1.5),  # one too many
        ([red_square] * 3, Scene((red_square,)), 1 / 2),  # two too many
        ([red_square, blue_square, green_square], Scene((red_square, blue_square), 0), 1 / 1.5),
        ([blue_square, red_square], Scene((red_square, blue_square), 0), 0.6),  # all but the relation
        ([red_square, red_square], Scene((red_square, blue_square), 0), 0.6 * (1 + 0.3) / 2 + 0.4 * 0.3),  # the relation counts as far as the objects do
    ]
    graded, strict = score_scenes(draw([(kinds, places) for kinds, _, _ in cases]), [scene for _, scene, _ in cases])
    assert graded.tolist() == pytest.approx([value for _, _, value in cases], abs=0.02)
    assert strict.tolist() == [float(value == 1.0) for _, _, value in cases]


# --- repairs ------------------------------------------------------------------------------------------------------------------------------------


def defects(kinds, places, scene):
    """The least number of single changes (recolour, reshape, add, remove, move) that make a scene true, counted without any picture."""
    fewest = 99
    for n in range(min(len(kinds), len(scene.kinds)) + 1):
        for wanted, found in itertools.product(itertools.combinations(range(len(scene.kinds)), n), itertools.permutations(range(len(kinds)), n)):
            cost = len(scene.kinds) - n + len(kinds) - n
            for i, j in zip(wanted, found, strict=True):
                cost += (scene.kinds[i][0] != kinds[j][0]) + (scene.kinds[i][1] != kinds[j][1])
            if scene.relation is not None and n == 2:
                right, down = (a - b for a, b in zip(places[found[0]], places[found[1]], strict=True))
                along, across = (right, down) if scene.relation < 2 else (down, right)
                cost += not (along if scene.relation % 2 else -along) > abs(across)
            fewest = min(fewest, cost)
    return fewest


def without(i, kinds, places):
    return kinds[:i] + kinds[i + 1 :], [*places[:i], *places[i + 1 :], places[i]]


def changes(kinds, places, num_wanted):
    """{name: [(kinds, places), ...]} of every single change. Objects are added where there are too few and removed where there are too many."""
    found = {
        "colour": [([*kinds[:i], (c, s), *kinds[i + 1 :]], places) for i, (old, s) in enumerate(kinds) for c in range(len(COLORS)) if c != old],
        "shape": [([*kinds[:i], (c, s), *kinds[i + 1 :]], places) for i, (c, old) in enumerate(kinds) for s in range(len(SHAPES)) if s != old],
        "relation": [(kinds, [places[1], places[0], places[2]])] if len(kinds) > 1 else [],
        "count up": [([*kinds, kind], places) for kind in KINDS] if len(kinds) < num_wanted else [],
        "count down": [without(i, kinds, places) for i in range(len(kinds))] if len(kinds) > num_wanted else [],
    }
    return {name: states for name, states in found.items() if states}


def breaks(kinds, places, num_wanted):
    """The same, and the ways to spoil a count that is right."""
    return changes(kinds, places, num_wanted) | changes(kinds, places, 3 if len(kinds) < 3 else 1) | changes(kinds, places, 1 if len(kinds) > 1 else 3)


def test_every_single_repair_of_a_broken_scene_raises_the_graded_score():
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    wanted = [random_scene(rng) for _ in range(2000)]
    rooms = place([Scene((scene.kinds * 3)[:2] + (KINDS[0],), scene.relation) for scene in wanted], generator).tolist()  # with room for a third object
    cases = []
    for scene, places in zip(wanted, rooms, strict=True):
        state = (list(scene.kinds), places)
        for _ in range(rng.choice([1, 2, 2])):
            ways = breaks(*state, len(scene.kinds))
            state = rng.choice(ways[rng.choice(sorted(ways))])
        before = defects(*state, scene)
        for name, states in changes(*state, len(scene.kinds)).items():
            repairs = [after for after in states if defects(*after, scene) == before - 1]
            cases += [(scene, state, name, after, before) for after in rng.sample(repairs, min(len(repairs), 1))]
    scenes = [case[0] for case in cases]
    broken, _ = score_scenes(draw([case[1] for case in cases]), scenes)
    repaired, strict = score_scenes(draw([case[3] for case in cases]), scenes)
    gain = repaired - broken
    for name, depth in itertools.product(["colour", "shape", "count up", "count down", "relation"], [1, 2]):
        mine = torch.tensor([case[2] == name and case[4] == depth for case in cases])
        assert mine.sum() >= 30, f"too few repairs of {name} with {depth} defects to say anything"
        assert gain[mine].min() > 0.01, f"{name} with {depth} defects: {cases[int(torch.where(mine, gain, 9.0).argmin())]}"
    assert strict[torch.tensor([case[4] == 1 for case in cases])].mean() > 0.99


# --- smoothness ---------------------------------------------------------------------------------------------------------------------------------


def jumps(picture, scene, num_moments, bound):
    """Changes of the graded score above ``bound`` between moments 1 / num_moments apart; ``picture`` draws the moments t [T] in [0, 1].

    A fine pass is made only where a coarse one, in hundredths, finds a change above the bound.
    """

    def graded(moments):
        return torch.cat([score_scenes(picture(part), [scene] * len(part))[0] for part in moments.split(256)])

    coarse = torch.linspace(0, 1, 101)
    values = graded(coarse)
    steep = torch.nonzero((values[1:] - values[:-1]).abs() > bound).flatten()
    if not len(steep):
        return []
    fine = coarse[steep, None] + torch.linspace(0, 0.01, num_moments // 100 + 1)
    values = graded(fine.flatten()).view_as(fine)
    return [change for change in (values[:, 1:] - values[:, :-1]).abs().flatten().tolist() if change > bound]


def other_kind(kind, attribute, rng):
    size = (len(COLORS), len(SHAPES))[attribute]
    new = list(kind)
    new[attribute] = (new[attribute] + rng.randrange(1, size)) % size
    return tuple(new)


@pytest.mark.parametrize("change", ["fade", "recolour", "reshape", "another picture"])
def test_blending_one_picture_into_another_makes_no_jump(change):
    # moments differ by 1/24000 of full contrast. Steep slopes, where a colour that is half there becomes the nearest one, shrink with the step; a true
    # jump does not: measured below 0.012, and up to 0.045 where objects of unrelated pictures overlap and one takes the other's place
    rng = random.Random(4)
    scenes, centres, images = random_scenes(4, 10)
    for number, (scene, places, image) in enumerate(zip(scenes, centres.tolist(), images, strict=True)):
        kinds = list(scene.kinds)
        if change == "fade":
            other = draw([without(0, kinds, places)])[0]
        elif change == "another picture":
            other = images[number - 1]
        else:
            other = draw([([other_kind(kinds[0], int(change == "reshape"), rng), *kinds[1:]], places)])[0]
        assert not jumps(lambda t, a=other, b=image: a + (b - a) * t.view(-1, 1, 1, 1), scene, 24000, bound=0.06 if change == "another picture" else 0.03)


@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0])
def test_moving_an_object_makes_no_jump(slope):
    # 3 pixels across the pixel grid, in steps of 1/330 pixel
    scenes, centres, _ = random_scenes(10, 8)
    for scene, places in zip(scenes, centres, strict=True):

        def picture(t, scene=scene, places=places):
            path = places.repeat(len(t), 1, 1)
            path[:, 0] += (3 * t[:, None] - 1.5) * torch.tensor([1.0, slope])
            return render([scene] * len(t), path)

        assert not jumps(picture, scene, 1000, bound=0.02)


@pytest.mark.parametrize("relation", range(4))
def test_a_relation_is_gained_and_lost_smoothly(relation):
    # two objects circle each other once, in steps of 0.06 pixels
    scene = Scene(((0, 1), (2, 2)), relation)
    angle = torch.linspace(0, 2 * torch.pi, 801)
    arm = 8 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    places = torch.stack([16.2 + arm, 15.9 - arm, torch.zeros_like(arm)], dim=1)
    images = render([scene] * 801, places)
    graded, strict = score_scenes(images, [scene] * 801)
    assert (graded[1:] - graded[:-1]).abs().max() < 0.09
    right, down = (places[:, 0] - places[:, 1]).unbind(1)
    along, across = (right, down) if relation < 2 else (down, right)
    margin = (along if relation % 2 else -along) - across.abs()
    assert strict[margin > 1].eq(1).all()
    assert strict[margin < -1].eq(0).all()
    assert graded[margin > 6].min() > graded[margin < -6].max() + 0.3


def test_graded_scores_barely_move_under_faint_noise(two_thousand):
    scenes, _, images = two_thousand
    noisy = (images[:500] + 0.004 * torch.randn(500, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))).clamp(0, 1)
    change = score_scenes(noisy, scenes[:500])[0] - score_scenes(images[:500], scenes[:500])[0]
    assert change.abs().max() < 0.05


# --- the detector -------------------------------------------------------------------------------------------------------------------------------


def test_the_detector_finds_every_object_its_kind_and_its_centre():
    scenes, centres, images = random_scenes(6, 300)
    presence, kinds, found, _ = detect(images)
    for i, scene in enumerate(scenes):
        n = len(scene.kinds)
        assert (presence[i] > 0.5).sum() == n
        distance = torch.cdist(centres[i, :n], found[i, :n])
        nearest = distance.argmin(1)
        assert sorted(nearest.tolist()) == list(range(n))
        assert distance.amin(1).max() < 0.75  # pixels
        assert [divmod(int(kinds[i, j].argmax()), len(SHAPES)) for j in nearest] == list(scene.kinds)


def test_kinds_are_probabilities():
    images = torch.rand(20, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    presence, kinds, _, _ = detect(images)
    torch.testing.assert_close(kinds.sum((2, 3)), torch.ones_like(presence))
    assert presence.ge(0).all()
    assert presence.le(1).all()


@pytest.mark.parametrize("corner", list(itertools.product([1.0, 31.0], [1.0, 31.0])))
def test_an_object_cut_off_by_the_corner_is_not_an_object(corner):
    image = draw([([(0, 0)], [corner])])
    assert detect(image)[0].max() < 0.5


# --- the reward -----------------------------------------------------------------------------------------------------------------------------------


def batch_of(scenes, images):
    return SampleBatch([Prompt(caption(scene, i % 4)) for i, scene in enumerate(scenes)], images=images)


@pytest.mark.parametrize("form", ["graded", "strict"])
def test_the_order_and_company_of_pictures_does_not_matter(form):
    scenes, _, images = random_scenes(8, 60)
    images[::3] = images.roll(1, 0)[::3]  # some are wrong
    reward = SceneReward(form)
    reward.load(torch.device("cpu"), torch.float32)
    values = reward.score(batch_of(scenes, images)).values
    assert 0 < values.eq(values.max()).sum() < 60
    order = torch.randperm(60, generator=torch.Generator().manual_seed(8))
    shuffled = reward.score(SampleBatch([Prompt(caption(scenes[i])) for i in order.tolist()], images=images[order])).values
    torch.testing.assert_close(shuffled, values[order], **FP32)
    alone = torch.cat([reward.score(batch_of([scene], image[None])).values for scene, image in zip(scenes, images, strict=True)])
    torch.testing.assert_close(alone, values, **FP32)


def test_the_graded_reward_reports_the_strict_one_beside_it():
    scenes, _, images = random_scenes(9, 40)
    images[:20] = images.roll(1, 0)[:20]
    graded, strict = (SceneReward(form).score(batch_of(scenes, images)) for form in ("graded", "strict"))
    assert graded.values.dtype == torch.float32
    assert graded.valid.all()
    assert set(graded.raw) == {"strict"}
    assert graded.raw["strict"].tolist() == strict.values.tolist()
    assert set(strict.values.tolist()) == {0.0, 1.0}
    assert strict.raw == {}
    assert (SceneReward().info.name, SceneReward("strict").info.name) == ("scene", "scene_strict")


@pytest.mark.parametrize("form", ["graded", "strict"])
def test_a_picture_with_nan_is_invalid_and_spoils_no_other(form):
    scenes, _, images = random_scenes(9, 4)
    clean = SceneReward(form).score(batch_of(scenes, images)).values
    images[1, 0, 5, 5] = float("nan")
    scores = SceneReward(form).score(batch_of(scenes, images))
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.problems == {1: "the picture has NaN or infinite pixels"}
    assert scores.values[1].isnan()
    torch.testing.assert_close(scores.values[scores.valid], clean[scores.valid], **FP32)


@pytest.mark.parametrize(
    ("images", "message"),
    [(None, "from the embedded model, got None"), (torch.zeros(1, 3, 64, 64), r"3 x 32 x 32 from the embedded model, got \(3, 64, 64\)")],
)
def test_pictures_of_another_model_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        SceneReward().score(SampleBatch([Prompt("a red circle")], images=images))


def test_a_caption_outside_the_grammar_is_refused_by_name():
    with pytest.raises(UserError, match="reward scene: not a scene caption: 'a purple cow'; expected a sentence such as"):
        SceneReward().score(SampleBatch([Prompt("a purple cow")], images=torch.zeros(1, 3, 32, 32)))


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="form must be graded or strict, not 'soft'"):
        SceneReward("soft")


# --- the world ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", range(4))
def test_every_scene_can_be_read_back_from_its_caption(form):
    for scene in SINGLE + COUNTED + PAIRS + RELATED:
        assert parse_caption(caption(scene, form)) == scene


def test_captions_by_hand():
    pair = Scene(((0, 0), (2, 1)), 2)
    assert [caption(pair, form) for form in range(4)] == [
        "a red circle above a blue square",
        "there is a red circle above a blue square",
        "an image of a red circle above a blue square",
        "a blue square with a red circle above it",
    ]
    assert caption(Scene(((3, 2),) * 3), 1) == "there are three yellow triangles"
    assert caption(Scene(((1, 0),)), 3) == "one green circle"
    assert caption(Scene(((1, 0), (0, 2)))) == "a green circle and a red triangle"


def test_captions_are_read_whatever_their_case_and_full_stop():
    assert parse_caption(" An image of a Red circle Left of a blue square. ") == Scene(((0, 0), (2, 1)), 0)


@pytest.mark.parametrize(
    "text", ["", "a red", "a red circle above", "four red circles", "a red circle and a blue square and a green circle", "not a red circle"]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a scene caption"):
        parse_caption(text)


@pytest.mark.parametrize("scene", [Scene(((0, 0), (1, 1), (2, 2))), Scene(((0, 0), (0, 0)), 1), Scene(((0, 0),), 1), Scene(()), Scene(((0, 0),) * 4)])
def test_a_scene_without_a_sentence_is_refused(scene):
    with pytest.raises(ValueError, match="no sentence describes Scene"):
        caption(scene)


def test_placed_objects_are_whole_apart_and_in_their_relation():
    scenes, centres, _ = random_scenes(11, 500)
    for scene, places in zip(scenes, centres, strict=True):
        n = len(scene.kinds)
        assert places[n:].eq(0).all()
        assert places[:n].min() >= 6.9
        assert places[:n].max() <= SIZE - 6.9
        assert n == 1 or torch.pdist(places[:n]).min() >= 12.5
        assert defects(list(scene.kinds), places.tolist(), scene) == 0


def test_shapes_cover_about_the_same_area_and_the_circle_exactly_its_own():
    axis = torch.arange(-12, 13) * 1.0
    dy, dx = torch.meshgrid(axis, axis, indexing="ij")
    area = [shape_coverage(dx, dy, k).sum().item() for k in range(3)]
    assert area[0] == pytest.approx(torch.pi * 5.2**2, rel=0.01)
    assert max(area) / min(area) < 1.25


def test_a_caption_outside_the_grammar_is_found_before_the_run():
    SceneReward().check_prompts([Prompt("a red circle")])
    with pytest.raises(UserError, match="a photo of a dog"):
        SceneReward().check_prompts([Prompt("a red circle"), Prompt("a photo of a dog")])


def test_a_rendered_object_has_its_colour_inside_and_the_background_outside():
    image = draw([([(2, 1)], [(10.5, 20.5)])])[0]
    torch.testing.assert_close(image[:, 20, 10], PALETTE[2])
    torch.testing.assert_close(image[:, 5, 25], BACKGROUND)
    assert image.dtype == torch.float32
