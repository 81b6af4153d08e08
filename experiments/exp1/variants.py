"""name -> (module, config). 64f/64c/128f/128c prefix = head dim, full or causal."""
V = {}
W2 = dict(QREG=True, ARR=True, GUARD=True)
W3 = dict(NWG=3, CREG=160, ST=3, ARR=True, GUARD=True)
def add(name, mod, **c):
    h = name.split('_')[0]
    V[name] = (mod, dict(D=int(h[:-1]), CAUSAL=h[-1] == 'c'), c)
# references (spec_best)
F3 = dict(W3, QST=2, XT=1); F2 = dict(W2, ST=3, XT=1)
add('64f_ref3', 'fab', **F3)
add('64f_ref2', 'fab', **F2, PP=1)
for pp in (0, 2, 3, 5): add(f'64f_w2_pp{pp}', 'fab', **F2, PP=pp)
for pp in (1, 2, 5): add(f'64f_w3_pp{pp}', 'fab', **F3, PP=pp)
for pp in (0, 1, 2): add(f'64f_w3_seq1_pp{pp}', 'fab', **F3, SEQ=1, PP=pp)
add('64f_w3_seq2_pp1', 'fab', **F3, SEQ=2, PP=1)
for pp in (1, 2): add(f'64f_w2_seq1_pp{pp}', 'fab', **F2, SEQ=1, PP=pp)
for pin in (1, 33):
    for q in (0, 1): add(f'64f_dual_p{pin}{"q" if q else ""}', 'dual', PIN=pin, QREG=bool(q), ARR=True)
add('64f_dual_p33_q2', 'dual', PIN=33, QST=2, ST=5, ARR=True)
add('64f_dual_p33_e0', 'dual', PIN=33, ERL=0, ARR=True)
add('64f_dual_p33_noarr', 'dual', PIN=33)
# causal 64
C2 = dict(W2, ST=3, HALF=True, DYN=True, SWZMB=16); C3 = dict(W3, DYN=True)
add('64c_ref2P', 'fab', **W2, ST=3, HALF=True, ORDER=2, PP=1)
add('64c_ref2D', 'fab', **C2, PP=1)
add('64c_ref3D', 'fab', **C3)
for pp in (2, 5): add(f'64c_w2_pp{pp}', 'fab', **C2, PP=pp)
add('64c_w2_seq1_pp1', 'fab', **C2, SEQ=1, PP=1)
add('64c_w3_seq1_pp0', 'fab', **C3, SEQ=1)
for pin in (1, 33): add(f'64c_dual_p{pin}P', 'dual', PIN=pin, ORDER=2, ARR=True)
for pin in (1, 33): add(f'64c_dual_p{pin}D', 'dual', PIN=pin, ORDER=1, DYN=True, SWZMB=16, ARR=True)
add('64c_dual_p33P_adj', 'dual', PIN=33, ORDER=2, PAIR=0, ARR=True)
add('64c_dual_p33D_q2', 'dual', PIN=33, ORDER=1, DYN=True, SWZMB=16, QST=2, ST=5, ARR=True)
# 128
add('128f_ref', 'fab', **W2, ST=2, PP=1)
for pp in (0, 2, 3): add(f'128f_pp{pp}', 'fab', **W2, ST=2, PP=pp)
for pp in (1, 2): add(f'128f_b64_pp{pp}', 'fab', **W2, BN=64, ST=5, PP=pp)
add('128f_b64_pp0', 'fab', **W2, BN=64, ST=5, PP=0)
add('128f_b64_x', 'fab', **W2, BN=64, ST=5, PP=1, XT=1)
D2 = dict(W2, HALF=True, DYN=True, SWZMB=32)
add('128c_refP', 'fab', **W2, ST=2, HALF=True, ORDER=2, PP=1)
add('128c_refD', 'fab', **D2, ST=2, PP=1)
for pp in (0, 2, 3): add(f'128c_pp{pp}D', 'fab', **D2, ST=2, PP=pp)
B64 = dict(W2, BN=64, ST=5)
add('128c_b64D', 'fab', **B64, DYN=True, SWZMB=32)
add('128c_b64P', 'fab', **B64, ORDER=2)
add('128c_b64xP', 'fab', **B64, ORDER=2, XT=1)
# traced: (variant, seqlen)
TRACE = [('64f_ref3', 4096), ('64f_ref2', 4096), ('64f_w2_pp5', 4096), ('64f_w3_seq1_pp0', 4096), ('64f_dual_p33', 4096), ('64c_ref2D', 4096), ('128f_ref', 4096), ('128c_refP', 2048)]
FABDEF = dict(BN=128, NWG=2, ST=2, QST=1, PIN=5, ORDER=None, QREG=False, KE=0, VE=0, DYN=False, XT=0, HALF=False, GUARD=False, PRE=False, PP=0, SEQ=0, TR=0, CREG=240, PREG=24)
DUALDEF = dict(BN=64, ST=6, QST=1, PIN=1, ORDER=None, QREG=False, KE=0, VE=0, DYN=False, PAIR=1, ERL=1, TR=0, CREG=240, PREG=24)
PROBLEMS = [(64, 0, 4096), (64, 1, 4096), (64, 0, 16384), (64, 1, 16384), (64, 0, 1024), (64, 1, 1024), (128, 1, 2048), (128, 0, 4096), (128, 1, 8192),
            (128, 0, 1024), (64, 0, 512), (64, 1, 512), (64, 0, 8192), (64, 1, 8192), (64, 0, 2048), (64, 1, 2048), (128, 0, 16384), (128, 1, 512)]
