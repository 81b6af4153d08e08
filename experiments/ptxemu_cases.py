import emurun, time, sys, torch
from attn_ladder import decode_hopper as dh
C=dh.Config
cases=[
 ("p16",dict(lens=[70,0,333,512],cap=512,h=8,hk=2,D=128,page=16,grid=3)),
 ("p16 q4 causal",dict(lens=[3,130,512],cap=512,h=8,hk=2,D=128,page=16,seqlen_q=4,grid=5)),
 ("p64 q16 group1",dict(lens=[5,300],cap=512,h=2,hk=2,D=128,page=64,seqlen_q=16,grid=2)),
 ("p256 full",dict(lens=[5,300,512],cap=512,h=16,hk=1,D=128,page=256,causal=False,grid=2)),
 ("d64 p16",dict(lens=[70,0,333,512],cap=512,h=9,hk=3,D=64,page=16,grid=3)),
 ("d64 p64 q5",dict(lens=[70,2,333,512],cap=512,h=9,hk=3,D=64,page=64,seqlen_q=5,grid=3)),
 ("d64 p256",dict(lens=[700,130],cap=768,h=16,hk=1,D=64,page=256,grid=3)),
 ("d64 contiguous q3 full",dict(lens=[700,130,0,1],cap=700,h=8,hk=2,D=64,seqlen_q=3,causal=False,grid=3)),
 ("d64 N64 split64",dict(lens=[700,130,0,1],cap=700,h=4,hk=1,D=64,grid=3,config=C(64,6,2,64))),
 ("d64 N64 p16 split64",dict(lens=[500,130,0,1],cap=512,h=4,hk=1,D=64,page=16,grid=3,config=C(64,6,2,64))),
 ("fp16 d128",dict(lens=[300,1],cap=320,h=4,hk=1,D=128,dtype="fp16",grid=2)),
 ("fp16 d64 p64",dict(lens=[300,1],cap=320,h=4,hk=1,D=64,page=64,dtype="fp16",grid=2)),
 ("rows",dict(lens=[300,17,40],cap=320,h=4,hk=1,D=128,rows=[2,0,4],grid=2)),
 ("bad",dict(lens=[300,-1,321,40,2**31-1],cap=320,h=4,hk=2,D=128,grid=2)),
 ("bad rows",dict(lens=[300,17,40,9],cap=320,h=4,hk=1,D=128,rows=[2,-1,4,2**30],grid=2)),
 ("bad page",dict(lens=[300,500],cap=512,h=4,hk=2,D=128,page=16,grid=3,bad=(1,25,2**20))),
 ("bad page neg",dict(lens=[300,500],cap=512,h=4,hk=2,D=128,page=64,grid=3,bad=(0,2,-1))),
 ("depth6 1cta",dict(lens=[1200,64,65],cap=1200,h=4,hk=2,D=128,config=C(64,6,1,256),grid=3)),
 ("40 splits",dict(lens=[2600],cap=2600,h=1,hk=1,D=64,config=C(64,6,2,64),grid=7)),
 ("130 sequences",dict(lens=[(i*37)%90 for i in range(130)],cap=90,h=2,hk=1,D=64,grid=4)),
]
sel=sys.argv[1:]
i,of=int(sel[0]),int(sel[1])
cases=[c for c in cases if len(sel)<3 or ("page" in c[1])]
for name,kw in cases[i::of]:
    t=time.time()
    try:
        r=emurun.emulate(seed=3,**kw); print("ok" if r[0]<0.02 and r[1]<1e-3 else "WRONG",name,[round(x,6) for x in r[:2]],"flag",r[2],r[3],"instr",round(time.time()-t,1),"s",flush=True)
    except Exception as e:
        import traceback; tb=traceback.extract_tb(e.__traceback__)[-1]
        print("FAIL",name,type(e).__name__,str(e)[:300],tb.lineno,flush=True)
