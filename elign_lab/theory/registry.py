"""Every statement of the theory, with the code that checks it, its broken variant, and where a reader meets it."""

from __future__ import annotations

from types import ModuleType

from elign_lab.theory import alchemical, error_bound, force, points, score, shaping, symmetry, tilt
from elign_lab.theory.check import Statement

_SYMMETRY = "11_symmetry_and_subspace.ipynb"
_SHAPING = "12_mdp_and_shaping.ipynb"
_ALIGNMENT = "13_what_alignment_converges_to.ipynb"
_FORCE = "14_pbrs_as_a_force.ipynb"


def _statement(module: ModuleType, name: str, text: str, source: str, notebook: str) -> Statement:
    check, broken = getattr(module, f"check_{name}"), getattr(module, f"broken_{name}")
    area = module.__name__.rpartition(".")[2]
    return Statement(
        f"{area}.{name}",
        text,
        source,
        check,
        broken,
        broken.__doc__ or "",
        notebook,
        f"{area}-{name}".replace("_", "-"),
    )


STATEMENTS: dict[str, Statement] = {
    s.name: s
    for s in (
        _statement(
            symmetry,
            "noise_dimension",
            "The position noise has 3(N - 1) dimensions: E|xi|^2 = 3(N - 1).",
            "SPEC section 1; paper section 2",
            _SYMMETRY,
        ),
        _statement(
            symmetry,
            "density",
            "The kernel's log-density with 3(N - 1) dimensions integrates to 1 over the subspace.",
            "paper section 3, the policy",
            _SYMMETRY,
        ),
        _statement(
            symmetry,
            "determinant",
            "In the coordinates of the first N - 1 atoms the density needs the factor N^(3/2).",
            "change of variables; Satorras et al. 2021 (E(n) normalizing flows)",
            _SYMMETRY,
        ),
        _statement(
            symmetry,
            "ratio",
            "Likelihood ratios, summed over the degrees of freedom, average to 1 under the old policy.",
            "paper section 3.3, the ratio rho",
            _SYMMETRY,
        ),
        _statement(
            symmetry,
            "invariance",
            "After any update of an equivariant network, rotated noise gives the rotated molecule.",
            "paper section 3.2, first paragraph",
            _SYMMETRY,
        ),
        _statement(
            score,
            "forward",
            "The Ornstein-Uhlenbeck process has the marginals of z_t = alpha z_0 + sigma xi.",
            "paper section 2",
            _SHAPING,
        ),
        _statement(
            score,
            "reversal",
            "The reverse equation with the exact score returns to the law of the data.",
            "paper section 2; Nelson 1967; Anderson 1982",
            _SHAPING,
        ),
        _statement(
            score,
            "denoising_score",
            "The regression target -xi / sigma and the score agree in every conditional mean.",
            "Vincent 2011, denoising score matching",
            _SHAPING,
        ),
        _statement(
            score,
            "ancestral",
            "The ancestral sampler with the exact noise prediction has the exact law of z_0.",
            "SPEC section 1; Ho et al. 2020",
            _SHAPING,
        ),
        _statement(
            shaping,
            "invariance",
            "For a fixed potential, shaping leaves the optimal policies unchanged.",
            "Ng, Harada and Russell 1999; paper section 3.1",
            _SHAPING,
        ),
        _statement(
            shaping,
            "telescoping",
            "The shaped return-to-go is gamma^t Phi(s_0) - Phi(s_t).",
            "paper Eq. 4",
            _SHAPING,
        ),
        _statement(
            shaping,
            "unbiased",
            "With gamma = 1 shaping is a state baseline: the expected policy gradient is unchanged.",
            "paper Eq. 4; Sutton et al. 2000 (baselines)",
            _SHAPING,
        ),
        _statement(
            shaping,
            "ranking",
            "A fixed potential ranks policies by shaped return as by the original return.",
            "paper section 3.1, on the plug-in estimate",
            _SHAPING,
        ),
        _statement(
            tilt,
            "maximiser",
            "The maximiser of E_q[-E] - KL(q || q0) / beta is q0 exp(-beta E) / Z, from any start.",
            "paper theorem 1 (Eq. 5)",
            _ALIGNMENT,
        ),
        _statement(
            tilt,
            "concavity",
            "The objective is strictly concave: the excess at the midpoint is JS(p, q) / beta.",
            "paper theorem 3, uniqueness",
            _ALIGNMENT,
        ),
        _statement(
            tilt,
            "optimum",
            "The value of the maximum is log(Z) / beta.",
            "paper theorem 1; Donsker and Varadhan",
            _ALIGNMENT,
        ),
        _statement(
            tilt,
            "reweighting",
            "Samples of q0 weighted by exp(-beta E) have the law q*.",
            "paper theorem 1",
            _ALIGNMENT,
        ),
        _statement(
            points,
            "alignment",
            "FED-GRPO with the KL of later steps in the return reaches the best Gaussian policy for theorem 1.",
            "paper theorem 1 and section 3.3",
            _ALIGNMENT,
        ),
        _statement(
            points,
            "fixed_point",
            "FED-GRPO with its own penalty on visited states reaches another fixed point, computed on a grid.",
            "SPEC section 4, the objective",
            _ALIGNMENT,
        ),
        _statement(
            points,
            "prefix",
            "With an untrained prefix the end point is the best policy over the last steps, not theorem 1's tilt.",
            "paper section 3.3, shared-prefix grouping",
            _ALIGNMENT,
        ),
        _statement(
            error_bound,
            "theorem",
            "TV of two tilts with energies within eps of each other is at most tanh(beta eps).",
            "paper theorem 2 (Eq. 6)",
            _ALIGNMENT,
        ),
        _statement(
            error_bound,
            "double_well",
            "The bound of theorem 2 on a double well, by quadrature.",
            "paper theorem 2 (Eq. 6)",
            _ALIGNMENT,
        ),
        _statement(
            error_bound,
            "sharp",
            "The best constant in theorem 2 is tanh(beta eps / 2), attained by two points.",
            "this package: the proof of lemma 1 with the ratio normalised",
            _ALIGNMENT,
        ),
        _statement(
            error_bound,
            "lemma",
            "A density ratio between exp(-c) and exp(c) implies TV <= tanh(c / 2), attained by two points.",
            "paper lemma 1",
            _ALIGNMENT,
        ),
        _statement(
            force,
            "quadratic",
            "The remainder of theorem 5 on a quadratic potential is of order sigma^4.",
            "paper theorem 5",
            _FORCE,
        ),
        _statement(
            force,
            "smooth_order",
            "On a smooth potential the remainder is of order sigma^4, one better than stated.",
            "paper theorem 5",
            _FORCE,
        ),
        _statement(
            force,
            "kinked_order",
            "Where the gradient is only Lipschitz the remainder is of order sigma^3: the theorem's order is attained.",
            "paper theorem 5",
            _FORCE,
        ),
        _statement(
            force,
            "stein",
            "The tilted mean is mu + beta gamma sigma^2 E_tilt[grad Phi], exactly.",
            "paper theorem 5, the proof",
            _FORCE,
        ),
        _statement(
            force,
            "molecule",
            "For water and GFN2-xTB the displacement tends to beta gamma sigma^2 f(mu).",
            "paper theorem 5",
            _FORCE,
        ),
        _statement(
            force,
            "types",
            "The h block: relaxed types move along the alchemical force -dE/d(type weights) of the learned oracle.",
            "paper theorem 5, the h block",
            _FORCE,
        ),
        _statement(
            alchemical,
            "recovered_angle",
            "The score difference recovers a force that was put into a model by hand.",
            "paper F.1 (Eq. 9, 10)",
            _FORCE,
        ),
        _statement(
            alchemical,
            "control",
            "A random direction of the subspace has mean cosine 0 with the force.",
            "paper F.1, Figure 10",
            _FORCE,
        ),
        _statement(
            alchemical,
            "bundled_pair",
            "What alignment added to edm-mini's score points along the oracle's force, at the steps it trained.",
            "paper F.1, Figure 10",
            _FORCE,
        ),
    )
}
"""All statements by name, "<module>.<statement>"."""


def statement(name: str) -> Statement:
    """One statement by name; ValueError lists the names."""
    if name not in STATEMENTS:
        raise ValueError(f"unknown statement {name!r}: expected one of {', '.join(STATEMENTS)}")
    return STATEMENTS[name]
