import sys, statistics, dataclasses, torch
sys.path.insert(0,'kernels')
from attn_ladder import stage5_everything as s5
from attn_ladder.stage import load
fa3=load('fa3').forward
flush=torch.empty(100<<20,dtype=torch.int8,device='cuda')
def C(**k): return s5.Config(**k)
three=dict(headdim=64,causal=True,consumers=3,num_buffers=3,q_in_registers=False)
cand={'w3_own_nopp':C(**three,ping_pong=False,schedule='dynamic'),'w3_oth':C(**three,overlap='others',schedule='dynamic'),'w3_oth16':C(**three,overlap='others',schedule='dynamic',l2_bytes=16<<20),'w3_oth_q2':C(**three,overlap='others',schedule='dynamic',num_q_buffers=2),'w3_own_pp':C(**three,schedule='dynamic'),
'w2_own':C(headdim=64,causal=True,num_buffers=3,half_diagonal=True,l2_bytes=16<<20,schedule='dynamic'),'w2_oth':C(headdim=64,causal=True,num_buffers=3,half_diagonal=True,l2_bytes=16<<20,schedule='dynamic',overlap='others')}
full={'default':None}
for (c,S,cs) in [(True,2048,cand),(True,4096,cand),(True,8192,cand),(True,16384,cand),(False,1024,full),(False,4096,full),(False,16384,full)]:
    B=16384//S
    q,k,v=(torch.randn(B,S,32,64,device='cuda',dtype=torch.bfloat16) for _ in range(3))
    fs={'fa3':lambda:fa3(q,k,v,causal=c),'fa3b':lambda:fa3(q,k,v,causal=c)}
    ref=fa3(q,k,v,causal=c)[0].float()
    for n,cfg in cs.items():
        f=lambda cfg=cfg: s5.forward(q,k,v,causal=c,config=cfg)
        try:
            o=f()[0]; torch.cuda.synchronize(); e=(o.float()-ref).norm()/ref.norm()
            if not e<0.01: print('BAD',n,S,e.item()); continue
            fs[n]=f
        except Exception as ex: print('EXC',n,repr(ex)[:150])
    tm={x:[] for x in fs}; ev=[torch.cuda.Event(enable_timing=True) for _ in range(2*len(fs))]
    for r in range(18):
        for i,x in enumerate(fs):
            flush.bitwise_not_(); torch.cuda._sleep(700000); ev[2*i].record(); fs[x](); ev[2*i+1].record()
        torch.cuda.synchronize()
        for i,x in enumerate(fs): tm[x].append(ev[2*i].elapsed_time(ev[2*i+1])*1e3)
    m={x:statistics.median(t[3:]) for x,t in tm.items()}
    print('causal' if c else 'full',S,f"fa3 {m['fa3']:.0f} A/A {m['fa3b']/m['fa3']:.3f}",{x:round(m['fa3']/y,3) for x,y in m.items() if x[:3]!='fa3'},flush=True)
