"""The same inner products under CKKS, for comparison: TenSEAL's own `dot`, and 64 sketches in a ciphertext's slots.

What neither does: hide what a key-holder could read besides (in slots that takes a multiplication by a mask, which is
measured here, and for CKKS no plaintext hides the noise, which depends on the inputs). Both are approximate.
"""

from __future__ import annotations

from functools import partial
from statistics import median

import numpy as np
import tenseal as ts
import tenseal.sealapi as seal

from .contract import Row
from .secagg_round import cpu

RING, PACKED_BITS = 8192, [60, 40, 40, 60]
DOT_BITS = {"ckks dot": [60, 40, 40, 60], "ckks dot, fewest primes": [50, 40, 50]}
"""Those of TenSEAL's own documentation, and the fewest that leave room for the one product."""
SCALE = 2.0**40


def dot_row(way: str, dimension: int, pairs: int) -> Row:
    """`CKKSVector.dot` of two encrypted sketches; median CPU milliseconds. `way`: of `DOT_BITS`."""
    context = ts.context(ts.SCHEME_TYPE.CKKS, RING, coeff_mod_bit_sizes=DOT_BITS[way])
    context.global_scale = SCALE
    context.generate_galois_keys()
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, dimension)) / np.sqrt(dimension)
    one, other = (ts.ckks_vector(context, vector) for vector in vectors)
    products = [cpu(partial(one.dot, other)) for _ in range(pairs)]
    error = max(abs(product.decrypt()[0] - float(vectors[0] @ vectors[1])) for product, _ in products)
    return {
        "way": way,
        "experts": 1,
        "dimension": dimension,
        "ms_per_pair": median(milliseconds for _, milliseconds in products),
        "bytes_up": 2 * len(one.serialize()),
        "bytes_down": len(products[0][0].serialize()),
        "error": error,
    }


def packed_row(dimension: int, times: int) -> Row:
    """A query against a ciphertext of as many sketches as its slots hold: multiply, rotate and add, mask."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(RING)
    parameters.set_coeff_modulus(seal.CoeffModulus.Create(RING, PACKED_BITS))
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
    generator, relinearisation, galois = seal.KeyGenerator(context), seal.RelinKeys(), seal.GaloisKeys()
    generator.create_relin_keys(relinearisation)
    generator.create_galois_keys(galois)
    encryptor = seal.Encryptor(context, generator.secret_key())
    encoder, evaluator = seal.CKKSEncoder(context), seal.Evaluator(context)
    slots = RING // 2
    experts = slots // dimension
    rng = np.random.default_rng(0)
    sketches = rng.normal(size=(experts, dimension)) / np.sqrt(dimension)
    query = rng.normal(size=dimension) / np.sqrt(dimension)

    def encrypted(values: list[float]) -> seal.Ciphertext:
        plain, made = seal.Plaintext(), seal.Ciphertext()
        encoder.encode(values, SCALE, plain)
        encryptor.encrypt_symmetric(plain, made)
        return made

    pool, asked = encrypted(sketches.ravel().tolist()), encrypted(np.tile(query, experts).tolist())
    first = [1.0 if slot % dimension == 0 else 0.0 for slot in range(slots)]

    def answer() -> seal.Ciphertext:
        product, mask = seal.Ciphertext(), seal.Plaintext()
        evaluator.multiply(pool, asked, product)
        evaluator.relinearize_inplace(product, relinearisation)
        evaluator.rescale_to_next_inplace(product)
        step = dimension // 2
        while step:
            turned = seal.Ciphertext()
            evaluator.rotate_vector(product, step, galois, turned)
            evaluator.add_inplace(product, turned)
            step //= 2
        encoder.encode(first, product.parms_id(), SCALE, mask)
        evaluator.multiply_plain_inplace(product, mask)
        evaluator.rescale_to_next_inplace(product)
        return product

    results = [cpu(answer) for _ in range(times)]
    opened = seal.Plaintext()
    seal.Decryptor(context, generator.secret_key()).decrypt(results[0][0], opened)
    found = np.array(encoder.decode_double(opened))[::dimension][:experts]
    return {
        "way": "ckks packed",
        "experts": experts,
        "dimension": dimension,
        "ms_per_pair": median(milliseconds for _, milliseconds in results) / experts,
        "error": float(np.abs(found - sketches @ query).max()),
    }
