from pathlib import Path
from safetensors import safe_open
from fire_megatron.checkpoint.files import *
from fire_megatron.checkpoint.maps import tensor_map, pack
from fire_megatron.checkpoint.torch_dist import ShardWriter, write_metadata
from fire_megatron.models.hf_config import read_hf_config
def hf_to_megatron(hf, out):
    shape=read_hf_config(hf); f=safe_open(str(Path(hf)/'model.safetensors'),'pt')
    with new_folder(Path(out)) as tmp:
        (tmp/WEIGHTS).mkdir()
        w=ShardWriter(tmp/WEIGHTS, rank=0)
        for t in tensor_map(shape):
            for row, part in pack(t,[f.get_tensor(n) for n in t.sources],shape):
                w.write(t.key, part, offset=(row,)+(0,)*(part.dim()-1), global_shape=t.shape)
        write_metadata(tmp/WEIGHTS, w.close(), common={})
        carry_files(Path(hf), tmp)
        write_json(tmp/MARKER, {'format':1,'family':shape.family})
