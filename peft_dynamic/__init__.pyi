# The public names, and where each is: read by type checkers, and by __init__.py.
from peft_dynamic.algebra import AdapterMoments as AdapterMoments
from peft_dynamic.algebra import adapter_moments as adapter_moments
from peft_dynamic.algebra import average_adapters as average_adapters
from peft_dynamic.algebra import merge_adapters as merge_adapters
from peft_dynamic.algebra import resize_adapter as resize_adapter
from peft_dynamic.density import ActivationDensityLoss as ActivationDensityLoss
from peft_dynamic.density import DensityReport as DensityReport
from peft_dynamic.density import calibrate_cut as calibrate_cut
from peft_dynamic.density import cut_activations as cut_activations
from peft_dynamic.density import measure_density as measure_density
from peft_dynamic.density import sparse_inference as sparse_inference
from peft_dynamic.export import export_lora as export_lora
from peft_dynamic.hub import push_adapter as push_adapter
from peft_dynamic.hub import write_card as write_card
from peft_dynamic.ranks import RankCurve as RankCurve
from peft_dynamic.ranks import rank_curve as rank_curve
from peft_dynamic.tuners.density_lora import DensityLoRAConfig as DensityLoRAConfig
from peft_dynamic.tuners.density_lora import DensityLoRAModel as DensityLoRAModel
from peft_dynamic.tuners.dylora import DyLoRAConfig as DyLoRAConfig
from peft_dynamic.tuners.dylora import DyLoRAModel as DyLoRAModel
from peft_dynamic.tuners.dylora import at_rank as at_rank
from peft_dynamic.tuners.dylora import budget_ranks as budget_ranks
from peft_dynamic.tuners.dylora import calibrate as calibrate
from peft_dynamic.tuners.dylora import drawn_rank as drawn_rank
from peft_dynamic.tuners.dylora import get_rank as get_rank
from peft_dynamic.tuners.dylora import hotswap_adapter as hotswap_adapter
from peft_dynamic.tuners.dylora import set_rank as set_rank
from peft_dynamic.tuners.loretta_adp import LorettaAdpConfig as LorettaAdpConfig
from peft_dynamic.tuners.loretta_adp import LorettaAdpModel as LorettaAdpModel
from peft_dynamic.tuners.loretta_rep import LorettaRepConfig as LorettaRepConfig
from peft_dynamic.tuners.loretta_rep import LorettaRepModel as LorettaRepModel
from peft_dynamic.tuners.moslora import MoSLoRAConfig as MoSLoRAConfig
from peft_dynamic.tuners.moslora import MoSLoRAModel as MoSLoRAModel
from peft_dynamic.tuners.qdylora import QDyLoRAConfig as QDyLoRAConfig
from peft_dynamic.tuners.qdylora import QDyLoRAModel as QDyLoRAModel

__version__: str
