"""Matching on sketches that only the cohort can decrypt: BFV with the sketch in the coefficients of a polynomial.

A sketch p of m whole numbers is a polynomial of the ring Z[x] / (x^N + 1) whose coefficients lie `stride` apart. Then

    (sum over lanes j of x^j p_j(x^stride)) * q(x^-stride)

has, at exponent j, the inner product <q, p_j>: one multiplication compares a query with `stride` experts, with no
rotation, and the server shifts each upload to the lane of its choice. All other coefficients of the product are partial
sums from which a key-holder could rebuild sketches; the server does not send them.
"""
